"""QRESU-Selective's rule as an optimizer: equal to the layer that updates itself, resumed bit for bit."""

import pytest
import torch
from torch import nn

from resu.core.selective import SelectionConfig
from resu.modules.linear import RESULinear
from resu.training.selective_optimizer import Selective
from resu.training.update_in_backward import optimizer_in_backward

CONFIG = SelectionConfig(tau_stable=0.3, k_select_ratio=0.4)


def layer(selective, **options):
    torch.manual_seed(0)
    made = RESULinear(16, 8)
    made.prune_by_magnitude(0.5)
    if selective:
        made.enter_qresu_selective_mode(selective_config=CONFIG, **options)
    else:
        made.enter_qresu_mode()
    return made


@pytest.mark.parametrize("in_backward", [True, False])
def test_equals_the_layer_that_updates_itself(in_backward):
    itself, other = layer(True, lr=0.1, weight_decay=0.01), layer(False)
    other.theta.data.copy_(itself.theta.data)

    def make(groups):
        return Selective(groups, lr=0.1, weight_decay=0.01, config=CONFIG)

    optimizer = optimizer_in_backward([other.theta], make) if in_backward else make([other.theta])
    for seed in range(6):
        x = torch.randn(5, 16, generator=torch.Generator().manual_seed(seed))
        for one in (itself, other):
            one(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(itself.theta, other.theta)
    assert bool((itself.theta != layer(True).theta).any())


def test_resumes_bit_for_bit(tmp_path):
    def steps(theta, optimizer, seeds):
        for seed in seeds:
            theta.grad = torch.randn(20, generator=torch.Generator().manual_seed(seed))
            optimizer.step()

    def fresh():
        theta = nn.Parameter(torch.ones(20, dtype=torch.bfloat16).float())
        return theta, Selective([theta], lr=0.1, config=CONFIG)

    whole, optimizer = fresh()
    steps(whole, optimizer, range(6))
    first, optimizer = fresh()
    steps(first, optimizer, range(3))
    torch.save({"theta": first.detach(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second, optimizer = fresh()
    second.data.copy_(state["theta"])
    optimizer.load_state_dict(state["optimizer"])
    steps(second, optimizer, range(3, 6))
    assert torch.equal(whole, second)


def test_what_is_not_selected_keeps_its_bits():
    theta = nn.Parameter(torch.randn(3, 10))
    before = theta.detach().clone()
    optimizer = Selective([theta], lr=0.1, config=SelectionConfig(k_select_ratio=0.2))
    theta.grad = torch.randn(3, 10)
    largest = theta.grad.abs().flatten().topk(6).indices
    optimizer.step()
    changed = (theta != before).flatten().nonzero().view(-1)
    assert set(changed.tolist()) == set(largest.tolist())
    theta.grad[0, 0] = torch.inf
    after = theta.detach().clone()
    optimizer.step()
    assert torch.equal(theta, after)


def test_settings_are_checked():
    theta = [nn.Parameter(torch.zeros(2))]
    with pytest.raises(ValueError, match="lr must be a finite number"):
        Selective(theta, lr=-1.0)
    with pytest.raises(ValueError, match="weight_decay"):
        Selective(theta, weight_decay=float("nan"))
