"""Updates by hand: more than one before the first step, budgets, and what rules need for them."""

import copy

import pytest
import torch
from torch import nn

from resu.training import Magnitude, Sparsifier
from resu.training.algorithms import MEST, SET, SNFS, GraNet, RigL, SRigL
from tests.training.helpers import batches, fit, mlp


def trained():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fit(model, optimizer, batches(3))
    return model, optimizer


def test_all_that_was_pruned_before_the_first_step_is_given_back():
    model, optimizer = trained()
    dense = copy.deepcopy(model.state_dict())
    sparsifier = Sparsifier(model, optimizer, Magnitude(sparsity=0.5), distribution="uniform")
    half = sparsifier.state_dict()
    for sparsity in (0.7, 0.6, 0.8):
        sparsifier.prune_to(sparsity)
    assert sparsifier.sparsity == 0.8
    sparsifier.load_state_dict(half)
    assert sparsifier.sparsity == 0.5
    for name, mask in sparsifier.masks.items():
        assert torch.equal(model.get_parameter(name)[mask.mask], dense[name][mask.mask])


def test_nothing_is_given_back_over_what_was_loaded_since():
    model, optimizer = trained()
    sparsifier = Sparsifier(model, optimizer, Magnitude(sparsity=0.5), distribution="uniform")
    half = sparsifier.state_dict()
    other = {name: torch.full_like(value, 0.25) for name, value in model.state_dict().items()}
    model.load_state_dict(other)
    sparsifier.prune_to(0.8)
    sparsifier.load_state_dict(half)
    for name, mask in sparsifier.masks.items():
        assert (model.get_parameter(name)[mask.mask] == 0.25).all()


def test_state_of_all_that_was_pruned_before_the_first_step_is_cleared():
    model, optimizer = trained()
    sparsifier = Sparsifier(model, optimizer, Magnitude(sparsity=0.5), distribution="uniform")
    sparsifier.prune_to(0.8)
    fit(model, optimizer, batches(1))
    for name, mask in sparsifier.masks.items():
        buffer = optimizer.state[model.get_parameter(name)]["momentum_buffer"]
        assert not buffer[~mask.mask].any()
        assert buffer[mask.mask].all()


@pytest.mark.parametrize("rule", [SET(sparsity=0.8, interval=4), SNFS(sparsity=0.8, interval=4)])
@pytest.mark.parametrize("steps", [0, 3, 5])
def test_the_sparsity_that_was_asked_for_is_reached(rule, steps):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, rule)
    fit(model, optimizer, batches(steps))
    for sparsity in (0.9, 0.7):
        sparsifier.prune_to(sparsity)
        assert sparsifier.sparsity == pytest.approx(sparsity, abs=1e-12)


@pytest.mark.parametrize("kind", [RigL, GraNet, MEST, SRigL])
def test_a_rule_without_its_gradient_prunes_and_does_not_grow(kind):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = kind(sparsity=0.8, interval=4, end_step=100, **({"initial_sparsity": 0.8} if kind is GraNet else {}))
    sparsifier = Sparsifier(model, optimizer, rule, pattern="row" if kind is SRigL else None)
    fit(model, optimizer, batches(3))
    sparsifier.prune_to(0.9)
    assert sparsifier.sparsity == 0.9
    with pytest.raises(ValueError, match=r"no gradient says where to grow.*prune_to\(\) can only prune"):
        sparsifier.prune_to(0.7)


@pytest.mark.parametrize("kind", [RigL, GraNet, MEST, SRigL, SNFS])
def test_a_layer_that_brings_no_gradient_keeps_its_mask(kind):
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.last = nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 5)

        def forward(self, x):
            return self.last(self.used(x))

    model = Aside()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"initial_sparsity": 0.8} if kind is GraNet else {}
    rule = kind(sparsity=0.8, interval=2, end_step=100, **options)
    sparsifier = Sparsifier(model, optimizer, rule, pattern="row" if kind is SRigL else None)
    before, weight = sparsifier.masks, model.unused.weight.detach().clone()
    fit(model, optimizer, batches(6))
    assert sparsifier.masks["unused.weight"] == before["unused.weight"]
    assert sparsifier.masks["used.weight"] != before["used.weight"]
    assert torch.equal(model.unused.weight, weight)


def test_prune_to_under_a_rule_that_grows_by_gradient_prunes_by_magnitude():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, RigL(sparsity=0.5, interval=100), distribution="uniform")
    fit(model, optimizer, batches(3))
    sizes = {n: model.get_parameter(n).detach().abs().masked_fill(~m.mask, -1) for n, m in sparsifier.masks.items()}
    sparsifier.prune_to(0.75)
    for name, mask in sparsifier.masks.items():
        order = sizes[name].flatten().sort(descending=True, stable=True).indices
        kept = torch.zeros(mask.numel, dtype=torch.bool)
        kept[order[: mask.numel // 4]] = True
        assert torch.equal(mask.mask.flatten(), kept), name
