"""Active weights keep their bits from enter to exit, whatever trains θ; pruned positions stay 0 in SPARSE mode."""

import pytest
import torch
from torch import nn

from resu.modules.base import FrozenWeightError, RESUMode
from resu.modules.conv import RESUConv2d
from resu.modules.linear import RESULinear
from tests.modules.helpers import enter, sample

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd_momentum_decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd_nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adam_foreach": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True, weight_decay=0.1),
    "adam_fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True, weight_decay=0.1),
    "adam_amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1, weight_decay=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


def _train(layer, optimizer, steps=4, seed=0):
    x = sample(layer, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(layer(x).shape, generator=generator)

    def closure():
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("make", [lambda: RESULinear(24, 16), lambda: RESUConv2d(2, 4, 3)], ids=["linear", "conv"])
def test_active_bits_under_an_optimizer_carried_over_from_the_dense_phase(name, make):
    torch.manual_seed(0)
    layer = make()
    optimizer = OPTIMIZERS[name]([layer.weight])
    _train(layer, optimizer)  # momentum of every weight
    layer.prune_by_magnitude(0.5)
    _train(layer, optimizer)  # SPARSE: pruned positions stay +0.0
    pruned = layer.mask.get_pruned(layer.weight)
    assert not pruned.any()
    assert not torch.signbit(pruned).any()
    layer.enter_resu_mode(epsilon=0.1)
    active, theta = layer.active_values().clone(), layer.theta_values().clone()
    _train(layer, optimizer)
    assert torch.equal(layer.active_values().view(torch.int32), active.view(torch.int32))
    assert not torch.equal(layer.theta_values(), theta)
    layer.exit_resu_mode(commit=True)
    assert layer.mode is RESUMode.DENSE


@pytest.mark.parametrize("name", ["sgd_momentum_decay", "adam", "adamw", "adamw_fused", "lbfgs"])
def test_active_bits_under_a_fresh_optimizer(name):
    torch.manual_seed(0)
    layer = enter(RESULinear(24, 16), "resu")
    active, theta = layer.active_values().clone(), layer.theta_values().clone()
    _train(layer, OPTIMIZERS[name]([layer.weight]))
    assert torch.equal(layer.active_values(), active)
    assert (layer.theta_values() != theta).float().mean() > 0.9
    layer.exit_resu_mode(commit=False)


@pytest.mark.parametrize("mode", ["qresu4", "qresu_selective"])
def test_codes_do_not_change(mode):
    torch.manual_seed(0)
    layer = enter(RESULinear(24, 16), mode)
    active, codes = layer.active_values().clone(), layer.codes.clone()
    _train(layer, torch.optim.AdamW([p for p in layer.parameters() if p is not layer.bias], lr=0.1, weight_decay=0.1))
    assert torch.equal(layer.codes, codes)
    assert torch.equal(layer.active_values(), active)


class _ByHand:
    """Moves every weight and is no torch.optim.Optimizer."""

    def __init__(self, parameters):
        self.parameters = list(parameters)

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self):
        for p in self.parameters:
            p.sub_(0.1 * p.grad + 0.01 * p)


def test_an_optimizer_outside_torch_is_found_out():
    layer = enter(RESULinear(24, 16), "resu")
    _train(layer, _ByHand([layer.weight]))
    with pytest.raises(FrozenWeightError, match=r"torch\.optim\.Optimizer"):
        layer.exit_resu_mode()
    assert layer.mode is RESUMode.RESU
    layer.exit_resu_mode(verify=False)
    assert layer.mode is RESUMode.DENSE


def test_a_gradient_changed_after_backward_is_found_out():
    layer = enter(RESULinear(24, 16), "resu")
    optimizer = torch.optim.SGD([layer.weight], lr=0.1)
    layer(torch.randn(4, 24)).sum().backward()
    layer.weight.grad.add_(torch.randn_like(layer.weight))
    optimizer.step()
    with pytest.raises(FrozenWeightError, match=r"a gradient that was changed after backward \(noise, SAM\)"):
        layer.exit_resu_mode()


def test_writing_through_data_is_found_out():
    layer = enter(RESULinear(24, 16), "resu")
    layer.weight.data.view(-1)[layer.mask.active_indices[0]] += 1e-3
    with pytest.raises(FrozenWeightError):
        layer.exit_resu_mode(commit=False)


def test_a_subclass_of_optimizer_is_held():
    class Mine(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(0.1 * p.grad + 0.01 * p)

    layer = enter(RESULinear(24, 16), "resu")
    active = layer.active_values().clone()
    _train(layer, Mine([layer.weight]))
    assert torch.equal(layer.active_values(), active)
    layer.exit_resu_mode()


def test_nan_in_the_loss_reaches_neither_active_nor_pruned_weights():
    layer = enter(RESULinear(24, 16), "sparse")
    optimizer = torch.optim.Adam([layer.weight], lr=0.1)
    (layer(sample(layer)) * float("nan")).sum().backward()
    assert not layer.mask.get_pruned(layer.weight.grad).any()
    optimizer.step()
    assert not layer.mask.get_pruned(layer.weight).any()

    layer = enter(RESULinear(24, 16), "resu")
    active = layer.active_values().clone()
    (layer(sample(layer)) * float("nan")).sum().backward()
    torch.optim.Adam([layer.weight], lr=0.1).step()
    assert torch.equal(layer.active_values(), active)


def test_gradient_accumulation_and_clipping():
    layer = enter(RESULinear(24, 16), "resu")
    active = layer.active_values().clone()
    optimizer = torch.optim.AdamW([layer.weight], lr=0.1)
    for _ in range(3):
        for seed in range(3):
            layer(sample(layer, seed=seed)).square().mean().backward()
        nn.utils.clip_grad_norm_([layer.weight], 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert torch.equal(layer.active_values(), active)


def test_a_frozen_base_weight_is_trained_as_theta_and_frozen_again():
    layer = RESULinear(24, 16)
    layer.weight.requires_grad_(False)
    layer.prune_by_magnitude(0.5)
    layer.enter_resu_mode()
    assert layer.weight.requires_grad
    _train(layer, torch.optim.Adam([layer.weight], lr=0.1))
    layer.exit_resu_mode(commit=True)
    assert not layer.weight.requires_grad


def test_mask_holds_in_the_next_fine_tuning_run():
    layer = enter(RESULinear(24, 16), "sparse")
    for make in (OPTIMIZERS["adamw"], OPTIMIZERS["sgd_momentum_decay"], OPTIMIZERS["lbfgs"]):
        _train(layer, make([layer.weight]))
        assert not layer.mask.get_pruned(layer.weight).any()


def test_after_exit_everything_trains_again():
    layer = enter(RESULinear(24, 16), "resu")
    layer.exit_resu_mode(commit=True)
    before = layer.weight.detach().clone()
    _train(layer, torch.optim.SGD([layer.weight], lr=0.1, weight_decay=0.1), steps=1)
    assert (layer.weight != before).all()


def test_mode_entered_while_the_weight_needs_no_gradient_is_still_held_later():
    layer = RESULinear(24, 16)
    layer.weight.requires_grad_(False)
    layer.prune_by_magnitude(0.5)
    layer.weight.requires_grad_(True)
    _train(layer, torch.optim.Adam([layer.weight], lr=0.1))
    assert not layer.mask.get_pruned(layer.weight).any()


@pytest.mark.parametrize("selective", [False, True])
def test_resu_step(selective):
    torch.manual_seed(0)
    layer = RESULinear(24, 16)
    layer.prune_by_magnitude(0.5)
    layer.enter_resu_mode(use_selective=selective, lr=0.1)
    active, theta = layer.active_values().clone(), layer.theta_values().clone()
    with pytest.raises(ValueError, match="no gradient"):
        layer.resu_step()
    layer(sample(layer)).square().sum().backward()
    grad = layer.mask.get_pruned(layer.weight.grad).clone()
    stats = layer.resu_step()
    assert layer.weight.grad is None
    assert torch.equal(layer.active_values(), active)
    changed = layer.theta_values() != theta
    if selective:
        assert int(changed.sum()) == stats["n_selected"]
        assert 0 < stats["selection_ratio"] <= 0.2 + 1 / theta.numel()
        assert 0 < stats["mean_consistency"] <= 1
    else:
        torch.testing.assert_close(layer.theta_values(), theta - 0.1 * grad, rtol=1e-6, atol=1e-8)
        assert stats["selection_ratio"] == 1.0
    given = torch.randn(16, 24)
    layer.resu_step(given)
    with pytest.raises(ValueError, match="grad_matrix has shape"):
        layer.resu_step(torch.randn(3, 3))
    layer.exit_resu_mode()


def test_a_gradient_with_nan_changes_nothing():
    for mode in ("resu_selective", "resu"):
        layer = enter(RESULinear(24, 16), mode)
        theta = layer.theta_values().clone()
        assert layer.resu_step(torch.full((16, 24), float("nan")))["skipped"] == 1.0
        assert torch.equal(layer.theta_values(), theta)
    layer = enter(RESULinear(24, 16), "qresu_selective")
    theta = layer.theta_values().clone()
    (layer(sample(layer)) * float("inf")).sum().backward()
    assert layer.last_update["skipped"] == 1.0
    assert torch.equal(layer.theta_values(), theta)
    assert not layer.theta_m.any()


def test_selective_layer_updates_itself_and_drops_the_gradient():
    torch.manual_seed(0)
    layer = enter(RESULinear(24, 16), "qresu_selective")
    x = sample(layer)
    target = torch.randn(5, 16)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        assert layer.theta.grad is None
    assert losses[-1] < 0.9 * losses[0]
    assert layer.last_update["n_pruned"] == layer.mask.n_pruned


def test_gradient_scale_of_a_loss_scaler_is_undone():
    results = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        layer = enter(RESULinear(24, 16), "qresu_selective")
        layer.gradient_scale = scale
        (layer(sample(layer)).square().sum() * scale).backward()
        results.append(layer.theta_values().clone())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)
