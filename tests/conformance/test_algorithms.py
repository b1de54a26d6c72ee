"""Every registered training algorithm under the one driver: exact zeros, exact counts, exact resume."""

import copy
import inspect

import pytest
import torch
from torch import nn

from resu.core.counting import keep_count
from resu.training.algorithms import algorithms
from resu.training.sparsifier import Sparsifier

SPARSITY, STEPS = 0.75, 12


def rule_of(name):
    kind = algorithms[name]
    known = inspect.signature(kind).parameters
    wished = {"sparsity": SPARSITY, "interval": 2, "begin_step": 0, "end_step": 8}
    return kind(**{k: v for k, v in wished.items() if k in known})


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))


# Rules that know one way of competing only.
PATTERNS = {"srigl": "row"}

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


class Run:
    def __init__(self, name, optimizer="adamw", **options):
        self.model = network()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        options.setdefault("pattern", PATTERNS.get(name))
        self.sparsifier = Sparsifier(self.model, self.optimizer, rule_of(name), **options)
        self.at = 0

    def go(self, until):
        while self.at < until:
            generator = torch.Generator().manual_seed(self.at)
            x, y = torch.randn(8, 1, 6, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            self.at += 1
            yield self.at

    def finish(self, until=STEPS):
        for _ in self.go(until):
            pass
        return self

    def zeros_are_exact(self):
        for name, mask in self.sparsifier.masks.items():
            values = mask.get_pruned(self.model.get_parameter(name).detach())
            if bool(values.any()) or bool(torch.signbit(values).any()):
                return False
        return True


@pytest.fixture(params=algorithms)
def name(request):
    return request.param


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("distribution", ["erk", "uniform", "global"])
def test_zeros_are_exact_and_the_end_is_exact_to_one_weight(name, optimizer, distribution):
    run = Run(name, optimizer, distribution=distribution)
    for step in run.go(STEPS):
        assert run.zeros_are_exact(), f"after step {step}"
    masks = run.sparsifier.masks
    assert sum(m.n_active for m in masks.values()) == keep_count(sum(m.numel for m in masks.values()), SPARSITY)
    assert all(m.n_active >= 1 for m in masks.values())
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


@pytest.mark.parametrize("cut", [0, 1, 4, 7, 9])
@pytest.mark.parametrize("order", ["model first", "sparsifier first"])
def test_trap_27_resume_is_bit_exact(name, cut, order):
    whole = Run(name).finish()
    first = Run(name).finish(cut)
    saved = copy.deepcopy((first.model.state_dict(), first.optimizer.state_dict(), first.sparsifier.state_dict()))
    second = Run(name)
    loads = [
        lambda: second.model.load_state_dict(saved[0]),
        lambda: second.optimizer.load_state_dict(saved[1]),
        lambda: second.sparsifier.load_state_dict(saved[2]),
    ]
    for load in loads if order == "model first" else reversed(loads):
        load()
    second.at = cut
    second.finish()
    for (key, a), b in zip(whole.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert whole.sparsifier.masks == second.sparsifier.masks
    assert whole.sparsifier.step == second.sparsifier.step


def test_states_are_safe_to_load(name, tmp_path):
    run = Run(name).finish(5)
    torch.save(run.sparsifier.state_dict(), tmp_path / "s.pt")
    state = torch.load(tmp_path / "s.pt", weights_only=True)
    other = Run(name)
    other.model.load_state_dict(run.model.state_dict())
    other.sparsifier.load_state_dict(state)
    assert other.sparsifier.masks == run.sparsifier.masks


def test_trap_26_runs_with_one_seed_are_one_run(name):
    first, second = Run(name, seed=3).finish(), Run(name, seed=3).finish()
    assert first.sparsifier.masks == second.sparsifier.masks
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


def test_trap_28_masks_hold_after_the_schedule_under_the_next_optimizer(name):
    run = Run(name).finish()
    before = run.sparsifier.masks
    run.optimizer = OPTIMIZERS["sgd"](run.model.parameters())
    run.finish(STEPS + 4)
    assert run.zeros_are_exact()
    assert run.sparsifier.masks == before


def test_trap_29_a_commit_leaves_exact_zeros_and_no_hooks(name):
    run = Run(name).finish()
    masks = run.sparsifier.commit()
    for key, mask in masks.items():
        assert not mask.get_pruned(run.model.get_parameter(key).detach()).any()
    run.finish(STEPS + 1)
    moved = [mask.get_pruned(run.model.get_parameter(k).detach()).any() for k, mask in masks.items()]
    assert any(moved)  # the plain model trains like any other


def test_input_settings_are_checked(name):
    kind = algorithms[name]
    for bad in (1.0, -0.1, float("nan"), "0.5"):
        with pytest.raises((ValueError, TypeError), match="sparsity"):
            kind(sparsity=bad)
    with pytest.raises(ValueError, match="interval"):
        kind(sparsity=0.5, interval=0)
