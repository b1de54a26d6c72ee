"""Positions that no optimizer step may change, under every optimizer torch has."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from resu.core import enforcement
from resu.core.enforcement import Constraint
from resu.core.mask import SparseMask

SHAPE = (6, 10)


def mask_of(seed=0):
    return SparseMask(torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)) < 0.5)


def parameter(dtype=torch.float32):
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)
    values[0, 0], values[0, 1] = -0.0, 0.0  # kept zeros of both signs
    return nn.Parameter(values)


def bits(x):
    return x.detach().clone().view(torch.int32)


def dense_steps(p, optimizer, n=5):
    """Momentum from before the mask, everywhere."""
    for i in range(n):
        p.grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 + i))
        optimizer.step()
        optimizer.zero_grad()


def masked_steps(p, optimizer, n=5):
    for i in range(n):
        target = torch.randn(SHAPE, generator=torch.Generator().manual_seed(200 + i))

        def closure(target=target):
            optimizer.zero_grad()
            loss = (p - target).square().sum()
            loss.backward()
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def lion(params):
    class Lion(torch.optim.Optimizer):  # one the library does not know: it moves every weight by lr, always
        def __init__(self, params):
            super().__init__(params, {"lr": 0.01})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"])

    return Lion(params)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd nesterov decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd maximize": lambda p: torch.optim.SGD(p, lr=0.01, maximize=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "adam decay": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "adam eps 0": lambda p: torch.optim.Adam(p, lr=0.1, eps=0.0),
    "adam tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, foreach=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4, line_search_fn="strong_wolfe"),
    "unknown": lion,
}


@pytest.fixture(params=OPTIMIZERS, ids=lambda name: name.replace(" ", "-"))
def make(request):
    return OPTIMIZERS[request.param]


def test_trap_14_pruned_positions_stay_positive_zero(make):
    p, mask = parameter(), mask_of()
    optimizer = make([p])
    if not isinstance(optimizer, torch.optim.LBFGS):
        dense_steps(p, optimizer)
    constraint = Constraint(p, mask)
    constraint.enforce()
    before = p.detach().clone()
    masked_steps(p, optimizer)
    assert bits(p)[~mask.mask].eq(0).all()
    assert not torch.equal(p.detach()[mask.mask], before[mask.mask])


def test_trap_14_frozen_positions_keep_their_bits(make):
    p, mask = parameter(), mask_of()
    optimizer = make([p])
    if not isinstance(optimizer, torch.optim.LBFGS):
        dense_steps(p, optimizer)
    Constraint(p, mask, "frozen")
    with torch.no_grad():
        p[0, 0] = -0.0
    before = bits(p)
    masked_steps(p, optimizer)
    assert torch.equal(bits(p)[mask.mask], before[mask.mask])
    assert not torch.equal(bits(p)[~mask.mask], before[~mask.mask])
    assert torch.isfinite(p[mask.mask]).all()


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "lbfgs"])  # computes its own gradients
def test_trap_14_a_gradient_from_before_is_not_applied(name):
    p, mask = parameter(), mask_of()
    optimizer = OPTIMIZERS[name]([p])
    p.grad = torch.ones(SHAPE)
    Constraint(p, mask, "frozen")
    before = bits(p)
    optimizer.step()
    assert torch.equal(bits(p)[mask.mask], before[mask.mask])


def test_two_constraints_on_one_weight_hold_all_of_it(make):
    p, mask = parameter(), mask_of()
    optimizer = make([p])
    Constraint(p, mask, "zero").enforce()
    Constraint(p, mask, "frozen")
    before = bits(p)
    masked_steps(p, optimizer)
    assert torch.equal(bits(p), before)


@pytest.mark.parametrize("kind", ["zero", "frozen"])
def test_trap_16_the_gradient_at_held_positions_is_zero_and_nan_does_not_survive(kind):
    p, mask = parameter(), mask_of()
    constraint = Constraint(p, mask, kind)
    held = constraint.held()
    (p * torch.where(held, float("nan"), 2.0)).sum().backward()
    assert torch.equal(p.grad, torch.where(held, 0.0, 2.0))


def test_an_open_gradient_still_holds_the_positions():
    for kind in ("zero", "frozen"):
        p, mask = parameter(), mask_of()
        constraint = Constraint(p, mask, kind, mask_gradient=False)
        constraint.enforce()
        before = bits(p)
        masked_steps(p, torch.optim.Adam([p], lr=0.1))
        assert torch.equal(bits(p)[constraint.held()], before[constraint.held()])
        assert p.grad[constraint.held()].abs().min() > 0


def test_a_weight_that_learns_to_require_gradients_later_is_held():
    for kind in ("zero", "frozen"):
        p, mask = parameter().requires_grad_(False), mask_of()
        constraint = Constraint(p, mask, kind)
        constraint.enforce()
        before = bits(p)
        p.requires_grad_(True)
        masked_steps(p, torch.optim.Adam([p], lr=0.1))
        assert torch.equal(bits(p)[constraint.held()], before[constraint.held()])


def test_trap_20_closures_are_called_as_the_optimizer_wants():
    p, mask = parameter(), mask_of()
    Constraint(p, mask).enforce()
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        losses.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == losses[0]
    optimizer.step(closure)
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert not p.detach()[~mask.mask].any()


@pytest.mark.parametrize("kind", ["zero", "frozen"])
@pytest.mark.parametrize("fused", [False, True])
def test_trap_21_a_step_that_found_inf_changes_nothing(kind, fused):
    p, mask = parameter(), mask_of()
    Constraint(p, mask, kind).enforce()
    optimizer = torch.optim.AdamW([p], lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    held = SparseMask(mask.mask if kind == "frozen" else ~mask.mask)
    for step, factor in enumerate([1.0, float("inf"), 1.0]):
        before, scale = bits(p), scaler.get_scale()
        optimizer.zero_grad()
        scaler.scale((p * factor).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(bits(p)[held.mask], before[held.mask])
        if step == 1:
            assert torch.equal(bits(p), before)
            assert scaler.get_scale() < scale
        else:
            assert not torch.equal(bits(p), before)


def test_trap_23_gradients_accumulate_at_free_positions_only():
    p, mask = parameter(), mask_of()
    Constraint(p, mask)
    for _ in range(3):
        p.sum().backward()
    assert torch.equal(p.grad, 3 * mask.mask.float())


def test_trap_28_it_holds_under_the_optimizer_of_the_next_run():
    p, mask = parameter(), mask_of()
    Constraint(p, mask).enforce()
    for make in (OPTIMIZERS["sgd momentum"], OPTIMIZERS["adamw"]):
        masked_steps(p, make([p]))
        assert not p.detach()[~mask.mask].any()


def test_it_lives_as_long_as_its_weight_without_being_kept():
    p, mask = parameter(), mask_of()
    Constraint(p, mask).enforce()
    gc.collect()
    masked_steps(p, torch.optim.AdamW([p], lr=0.1))
    assert not p.detach()[~mask.mask].any()
    seen = weakref.ref(p)
    count = len(enforcement._live)
    del p
    gc.collect()
    assert seen() is None
    assert len(enforcement._live) < count


def test_removed_means_free():
    p, mask = parameter(), mask_of()
    constraint = Constraint(p, mask)
    constraint.remove()
    constraint.remove()
    p.sum().backward()
    assert p.grad.all()
    before = p.detach().clone()
    torch.optim.SGD([p], lr=0.1).step()
    assert torch.allclose(p, before - 0.1)


def test_other_weights_and_other_optimizers_are_left_alone():
    p, other = parameter(), parameter()
    Constraint(p, mask_of()).enforce()
    before = bits(p)
    other.grad = torch.ones(SHAPE)
    expected = other.detach() - 0.1
    torch.optim.SGD([other], lr=0.1).step()
    assert torch.equal(other.detach(), expected)
    assert torch.equal(bits(p), before)


def test_a_mask_may_be_exchanged_between_steps():
    p = parameter()
    constraint = Constraint(p, mask_of(0))
    optimizer = torch.optim.AdamW([p], lr=0.1)
    for seed in (0, 1, 2):
        constraint.mask = mask_of(seed)
        masked_steps(p, optimizer, 2)
        assert not p.detach()[~mask_of(seed).mask].any()


def test_a_copy_holds_the_copied_weight():
    layer = nn.Linear(10, 6)
    layer.held = Constraint(layer.weight, mask_of())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.held.parameter is other.weight
        assert other.held.mask == layer.held.mask
        masked_steps(other.weight, torch.optim.AdamW(other.parameters(), lr=0.1), 2)
        assert not other.weight.detach()[~mask_of().mask].any()
    assert layer.held.parameter is layer.weight


def test_sparse_gradients_are_held_too():
    embedding = nn.Embedding(*SHAPE, sparse=True)
    mask = mask_of()
    Constraint(embedding.weight, mask).enforce()
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    embedding(torch.tensor([0, 1, 1])).sum().backward()
    optimizer.step()
    assert not embedding.weight.detach()[~mask.mask].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_held(dtype):
    p, mask = parameter(dtype), mask_of()
    before = p.detach().clone()
    Constraint(p, mask, "frozen")
    p.grad = None
    (p * p).sum().backward()
    torch.optim.AdamW([p], lr=0.1).step()
    assert torch.equal(p.detach()[mask.mask], before[mask.mask])


def test_input_a_mask_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"mask of shape \(6, 10\) does not fit a weight of shape \(10, 6\)"):
        Constraint(nn.Parameter(torch.zeros(10, 6)), mask_of())
    with pytest.raises(ValueError, match="kind must be"):
        Constraint(parameter(), mask_of(), "free")
