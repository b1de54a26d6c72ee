import copy

import pytest
import torch
from torch import nn

from resu.modules.convert import convert_to_resu
from resu.pruning.holding import hold_masks
from resu.pruning.mask_generator import compute_random_mask
from resu.pruning.pruners import GradualPruner, prune_iteratively
from resu.training import Sparsifier, Static


def _train(model, optimizer, steps=4):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 12)).square().mean().backward()
        optimizer.step()


def _model():
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trap_14_momentum_and_decay_move_no_pruned_weight(name):
    model = _model()
    optimizer = OPTIMIZERS[name](model.parameters())
    _train(model, optimizer)  # momentum from before
    masks = compute_random_mask(model, 0.7)
    with hold_masks(model, masks) as held:
        _train(model, optimizer)
        for n, p in model.named_parameters():
            if n in masks:
                assert torch.equal(p[~masks[n]], torch.zeros_like(p[~masks[n]]))
                assert not torch.signbit(p[~masks[n]]).any()
                assert (p[masks[n]] != 0).all()
        assert held.enforce() == 0
    _train(model, optimizer)  # let go
    assert any((model.get_parameter(n)[~m] != 0).any() for n, m in masks.items())


def test_enforce_counts_what_strayed():
    model = _model()
    masks = compute_random_mask(model, 0.5)
    with hold_masks(model, masks) as held:
        with torch.no_grad():
            model[0].weight.fill_(1.0)
        assert held.enforce() == int((~masks["0.weight"]).sum())
        assert held.enforce() == 0


def test_new_masks_and_optimizer_state_of_what_dies():
    model = _model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    first = compute_random_mask(model, 0.3, seed=1)
    held = hold_masks(model, first)
    _train(model, optimizer)
    second = {n: m & compute_random_mask(model, 0.5, seed=2)[n] for n, m in first.items()}
    held.update(second, optimizer)
    for n, mask in second.items():
        p = model.get_parameter(n)
        died = first[n] & ~mask
        assert (optimizer.state[p]["exp_avg"][died] == 0).all()
        assert (optimizer.state[p]["exp_avg"][mask] != 0).any()
        assert (p[~mask] == 0).all()
    held.release()


def test_resurrection_layers_hold_their_own_mask():
    model = convert_to_resu(_model())
    masks = compute_random_mask(model, 0.5)
    with hold_masks(model, masks) as held:
        assert torch.equal(model[0].mask.mask, masks["0.weight"])
        assert set(held.masks) == set(masks)
    assert model[0].is_sparse


def test_one_weight_has_one_holder_and_the_error_names_the_way_out():
    model = _model()
    masks = compute_random_mask(model, 0.5)
    held = hold_masks(model, masks)
    with pytest.raises(ValueError, match=r"held by a mask already.*release\(\)"):
        hold_masks(model, masks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="held by a mask already"):
        Sparsifier(model, optimizer, Static(sparsity=0.5))
    gradual = GradualPruner(final_sparsity=0.5, end_step=0)
    with pytest.raises(ValueError, match="held by a mask already"):
        gradual.step(model, 0)
    with pytest.raises(ValueError, match="held by a mask already"):
        prune_iteratively(model, [0.5], None)
    held.release()
    hold_masks(model, masks).release()


def test_a_failed_update_holds_nothing():
    model = _model()
    with pytest.raises(ValueError, match=r"no parameter '9\.weight'; it has: 0\.weight"):
        hold_masks(model, {"9.weight": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"has shape \(2, 2\), the parameter \(16, 12\)"):
        hold_masks(model, {"0.weight": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(TypeError, match="bool"):
        hold_masks(model, {"0.weight": torch.ones(16, 12)})
    hold_masks(model, compute_random_mask(model, 0.5)).release()


def test_a_copy_of_the_model_trains_freely():
    model = _model()
    masks = compute_random_mask(model, 0.5)
    with hold_masks(model, masks):
        other = copy.deepcopy(model)
        _train(other, torch.optim.SGD(other.parameters(), lr=0.1))
        assert (other[0].weight[~masks["0.weight"]] != 0).any()
