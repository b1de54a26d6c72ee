"""Drop and grow: truth tables by hand, then any layer against loops that say what is meant."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resu.core.pattern import NM, Block, Channel, Unstructured, get_pattern
from resu.training.algorithms import (
    ACDC,
    MEST,
    RESU,
    SET,
    SNFS,
    STE,
    GraNet,
    Magnitude,
    RigL,
    SRigL,
    Static,
    TopKAST,
    View,
)
from resu.training.algorithms.drop_grow import drop_and_grow, drop_fraction, finite_growth, kept_through, moved_count


def view_of(weight, mask, keep, pattern=None, **more):
    weight = torch.as_tensor(weight)
    mask = torch.as_tensor(mask, dtype=torch.bool)
    return View(
        name="w",
        weight=torch.where(mask, weight, torch.zeros_like(weight)),
        mask=mask,
        keep=keep,
        generator=torch.Generator().manual_seed(5),
        pattern=get_pattern(pattern),
        step=more.pop("step", 4),
        **more,
    )


def table(text):
    """Rows of ``o`` (active) and ``.``."""
    return torch.tensor([[c == "o" for c in row] for row in text.split()])


# Each by hand. `rank` matters where the mask is o; `growth` everywhere.
TABLES = {
    # 5 -4 3 2 active, two stay (5, 4); of the rest growth 9 and 8 are best: a pruned one and the dropped 3.
    "tensor: a dropped weight may come back": (
        "tensor",
        "ooo. ...o",
        [[5.0, 4.0, 3.0, 0.0], [0.0, 0.0, 0.0, 2.0]],
        [[9.0, 9.0, 8.0, 1.0], [9.0, 2.0, 3.0, 4.0]],
        (4, 2),
        "ooo. o...",
    ),
    # All equal: the lower index stays, and the lower index grows.
    "tensor: ties": ("tensor", ".oo. oo..", [[1.0] * 4] * 2, [[1.0] * 4] * 2, (4, 2), "oooo ...."),
    "tensor: nothing survives": (
        "tensor",
        "oo.. ....",
        [[5.0, 4.0, 0.0, 0.0], [0.0] * 4],
        [[0.0, 1.0, 2.0, 3.0]] * 2,
        (2, 0),
        "...o ...o",
    ),
    "tensor: everything survives": (
        "tensor",
        "oo.. ....",
        [[5.0, 4.0, 0.0, 0.0], [0.0] * 4],
        [[0.0, 1.0, 2.0, 3.0]] * 2,
        (2, 2),
        "oo.. ....",
    ),
    "tensor: it shrinks": (
        "tensor",
        "oooo ....",
        [[1.0, 4.0, 3.0, 2.0], [0.0] * 4],
        [[0.0] * 4] * 2,
        (2, 2),
        ".oo. ....",
    ),
    "tensor: it grows": (
        "tensor",
        "oo.. ....",
        [[1.0, 4.0, 0.0, 0.0], [0.0] * 4],
        [[0.0, 0.0, 0.0, 1.0], [0.0, 2.0, 0.0, 0.0]],
        (4, 2),
        "oo.o .o..",
    ),
    # 1 and 2 are the smallest of the layer, both in the first row, which so grows two; the second row keeps all.
    "row: dropped over the layer, grown in the row": (
        "row",
        "oo.. oo..",
        [[1.0, 2.0, 0.0, 0.0], [3.0, 4.0, 0.0, 0.0]],
        [[0.0, 1.0, 5.0, 4.0], [0.0, 0.0, 9.0, 9.0]],
        (4, 2),
        "..oo oo..",
    ),
    # Three for two rows: the first holds one more.
    "row: a remainder": (
        "row",
        "oo.. o...",
        [[1.0, 2.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]],
        [[0.0, 0.0, 0.0, 4.0], [0.0, 0.0, 9.0, 9.0]],
        (3, 2),
        ".o.o o...",
    ),
    # Groups of four keep two. 1 goes: its group takes the best growth, the other two groups have no room.
    "2:4": (
        "2:4",
        "oo..oo.. .oo.oo..",
        [[1.0, 5.0, 0.0, 0.0, 6.0, 7.0, 0.0, 0.0], [0.0, 2.0, 8.0, 0.0, 4.0, 3.0, 0.0, 0.0]],
        [[0.0, 0.0, 1.0, 2.0, 0.0, 0.0, 9.0, 9.0], [9.0, 0.0, 0.0, 9.0, 0.0, 0.0, 9.0, 9.0]],
        (8, 7),
        ".o.ooo.. .oo.oo..",
    ),
    # Blocks of 2 x 2, means 4, 2.5 and (pruned) 0; the block of mean 2.5 goes, that of growth 3 comes.
    "block:2x2": (
        "block:2x2",
        "oooo.. oooo..",
        [[1.0, 9.0, 2.0, 3.0, 0.0, 0.0], [3.0, 3.0, 2.0, 3.0, 0.0, 0.0]],
        [[0.0, 0.0, 1.0, 1.0, 3.0, 3.0], [0.0, 0.0, 1.0, 1.0, 3.0, 3.0]],
        (8, 4),
        "oo..oo oo..oo",
    ),
    "channel:1": (
        "channel:1",
        "oo.. oo..",
        [[1.0, 2.0, 0.0, 0.0], [1.0, 3.0, 0.0, 0.0]],
        [[0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 2.0, 2.0]],
        (4, 2),
        ".o.o .o.o",
    ),
    "channel:0": (
        "channel:0",
        "oo oo .. ..",
        [[1.0, 2.0], [2.0, 2.0], [0.0, 0.0], [0.0, 0.0]],
        [[9.0, 9.0], [0.0, 0.0], [8.0, 8.0], [1.0, 1.0]],
        (4, 2),
        "oo oo .. ..",
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TABLES)
def test_tables(name, dtype):
    pattern, mask, rank, growth, (keep, survive), expected = TABLES[name]
    rank, growth = torch.tensor(rank, dtype=dtype), torch.tensor(growth, dtype=dtype)
    new = drop_and_grow(view_of(rank, table(mask), keep, pattern), rank, growth, survive)
    assert torch.equal(new, table(expected))


def test_trap_01_a_layer_of_equal_weights_and_no_gradient_keeps_its_count():
    for keep in (1, 7, 11):
        mask = torch.arange(12).view(3, 4) >= 12 - keep
        new = drop_and_grow(view_of(torch.ones(3, 4), mask, keep), torch.ones(3, 4), torch.zeros(3, 4), keep // 2)
        assert int(new.sum()) == keep


# -- any layer -------------------------------------------------------------------------------------------------------
def top(candidates, score, count):
    return set(sorted(candidates, key=lambda i: (-score[i], i))[: max(0, count)])


def units_of(pattern, shape):
    """The positions that live and die together, or None where single weights do."""
    index = torch.arange(math.prod(shape)).view(shape)
    if isinstance(pattern, Channel):
        return [slice_.flatten().tolist() for slice_ in index.movedim(pattern.dim, 0)]
    if isinstance(pattern, Block):
        rows = index.flatten(1)
        return [
            rows[r : r + pattern.h, c : c + pattern.w].flatten().tolist()
            for r in range(0, rows.shape[0], pattern.h)
            for c in range(0, rows.shape[1], pattern.w)
        ]
    return None


def rooms(pattern, shape, keep):
    """For single weights: sets of positions, and how many each may hold."""
    index = torch.arange(math.prod(shape)).view(shape)
    if pattern == Unstructured("row"):
        share, extra = divmod(keep, shape[0])
        return [(row.flatten().tolist(), share + (r < extra)) for r, row in enumerate(index)]
    if isinstance(pattern, NM):
        lines = index.movedim(1, -1).reshape(-1, shape[1]).tolist()
        groups = [line[i : i + pattern.m] for line in lines for i in range(0, shape[1], pattern.m)]
        return [(group, min(pattern.n, len(group))) for group in groups]
    return [(index.flatten().tolist(), keep)]


def by_loops(view, rank, growth, survive):
    """What the docstring of ``drop_and_grow`` says, one position or one unit at a time."""
    shape, pattern, keep = tuple(view.mask.shape), view.pattern, view.keep
    n = math.prod(shape)
    active = {i for i, a in enumerate(view.mask.flatten().tolist()) if a}
    rank, growth = rank.double().flatten().tolist(), growth.double().flatten().tolist()
    units = units_of(pattern, shape)
    if units is not None:

        def fills(count):
            return min(len(units), max(1, count * len(units) // n))

        def mean(score):
            return [sum(score[i] for i in unit) / len(unit) for unit in units]

        alive = [k for k, unit in enumerate(units) if set(unit) <= active]
        stay = top(alive, mean(rank), fills(survive)) if survive else set()
        grow = top(set(range(len(units))) - stay, mean(growth), fills(keep) - len(stay))
        return {i for k in stay | grow for i in units[k]}
    places = rooms(pattern, shape, keep)
    if len(active) > keep:
        active = set().union(*(top(set(where) & active, rank, room) for where, room in places))
    stay = top(active, rank, survive)
    return stay.union(*(top(set(where) - stay, growth, room - len(set(where) & stay)) for where, room in places))


PATTERNS = ["tensor", "row", "2:4", "1:3", "block:2x2", "block:3x1", "channel:0", "channel:1"]
shapes = st.one_of(
    st.tuples(st.integers(1, 6), st.integers(1, 9)),
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 2), st.integers(1, 3)),
)


def numbers(shape, seed, kind, dtype):
    """Not negative; few levels make ties."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "levels":
        return torch.randint(0, 3, shape, generator=generator).to(dtype)
    if kind == "zero":
        return torch.zeros(shape, dtype=dtype)
    x = torch.randint(1, 1 << 8, shape, generator=generator).to(torch.float64)  # exact in every dtype
    return (x * {"plain": 1.0, "huge": 2.0**100, "tiny": 2.0**-100}[kind]).to(dtype)


@st.composite
def layers(draw, patterns=tuple(PATTERNS)):
    """A layer with a legal mask, a budget that may have changed since, and scores."""
    shape, pattern = draw(shapes), get_pattern(draw(st.sampled_from(patterns)))
    n, seed = math.prod(shape), draw(st.integers(0, 10**6))
    before, after = draw(st.integers(1, n)), draw(st.integers(1, n))
    if draw(st.booleans()):
        after = before
    mask = pattern.select(numbers(shape, seed, "plain", torch.float64), pattern.reachable(shape, before))
    kind = st.sampled_from(["plain", "levels", "zero", "huge", "tiny"])
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    rank, growth = (numbers(shape, seed + k, draw(kind), dtype) for k in (1, 2))
    keep = pattern.reachable(shape, after)
    survive = draw(st.sampled_from([0, 1, keep - 1, keep, draw(st.integers(0, keep))]))
    sign = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).mul_(2).sub_(1).to(dtype)
    view = view_of(rank * sign, mask, keep, pattern, gradient=growth.float(), momentum=growth.float())
    return view, rank, growth, min(max(survive, 0), keep)


def copied(view):
    return [x.clone() for x in (view.weight, view.mask, view.gradient, view.momentum)]


@settings(max_examples=300)
@given(layer=layers())
def test_drop_and_grow_equals_loops(layer):
    view, rank, growth, survive = layer
    before, scores = copied(view), (rank.clone(), growth.clone())
    new = drop_and_grow(view, rank, growth, survive)
    assert set(new.flatten().nonzero().flatten().tolist()) == by_loops(view, rank, growth, survive)
    assert view.pattern.violations(new) == 0
    if units_of(view.pattern, view.mask.shape) is None:
        assert int(new.sum()) == view.keep
    assert all(torch.equal(a, b) for a, b in zip(before, copied(view), strict=True))
    assert torch.equal(rank, scores[0])
    assert torch.equal(growth, scores[1])


@given(layer=layers(("tensor",)), bad=st.sampled_from([math.inf, math.nan]))
def test_overflows_at_pruned_positions_oust_no_survivor(layer, bad):
    view, rank, growth, survive = layer
    growth = growth.float().masked_fill(~view.mask, bad)
    new = drop_and_grow(view, rank, growth, survive)
    clean = growth.nan_to_num(nan=-1.0, posinf=1e37)
    assert set(new.flatten().nonzero().flatten().tolist()) == by_loops(view, rank, clean, survive)


def test_growth_of_any_type_becomes_finite():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        wish = finite_growth(torch.tensor([0.0, 3.0, math.inf, math.nan, -math.inf], dtype=dtype))
        assert wish.isfinite().all()
        assert wish.argmax() == 2
        assert wish.sum().isfinite()
        assert wish[:2].tolist() == [0.0, 3.0]
    assert finite_growth(torch.tensor([1, 2])).dtype == torch.float64


# -- rules -----------------------------------------------------------------------------------------------------------
RULES = {
    "rigl": RigL(sparsity=0.5, end_step=100, alpha=0.5),
    "set": SET(sparsity=0.5, end_step=100, alpha=0.5),
    "granet": GraNet(sparsity=0.5, end_step=100, alpha=0.5),
    "mest": MEST(sparsity=0.5, end_step=100, mutation=(0.5, 0.0), grad_weight=0.5),
    "mest-soft": MEST(sparsity=0.5, end_step=100, mutation=(0.5, 0.0), grad_weight=0.5, soft=True),
    "snfs": SNFS(sparsity=0.5, end_step=100, alpha=0.5, redistribution=False),
    "srigl": SRigL(sparsity=0.5, end_step=100, alpha=0.5),
}
GROWS_AT_RANDOM = ("set", "mest", "mest-soft")


def fresh(view):
    return View(**{**view.__dict__, "generator": torch.Generator().manual_seed(5)})


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=60)
@given(data=st.data())
def test_rules_follow_their_formula_on_any_layer(name, data):
    rule = RULES[name]
    allowed = [p for p in PATTERNS if rule.refuses(get_pattern(p)) is None]
    view, _, growth, _ = data.draw(layers(tuple(allowed)))
    before = copied(view)
    new = rule.update_mask(view, 0.5, view.step)
    assert all(torch.equal(a, b) for a, b in zip(before, copied(view), strict=True))
    assert torch.equal(new, rule.update_mask(fresh(view), 0.5, view.step))
    single = units_of(view.pattern, view.mask.shape) is None
    count = int(new.sum())
    if name == "mest-soft":
        extra = min(view.mask.numel(), view.keep + math.floor(0.5 * view.keep))
        assert not single or count == extra
    else:
        assert not single or count == view.keep
    if name == "srigl":  # neurons it has given up are empty, the others hold alike
        rows = new.flatten(1).sum(1)
        assert rows[rows > 0].max() - rows[rows > 0].min() <= 1
        return
    assert view.pattern.violations(new) == 0
    if name == "mest-soft" or (name == "snfs" and not view.momentum.any()):  # a layer without a gradient rests
        return
    size = view.weight.abs()
    if name == "mest":
        size = size + 0.5 * view.gradient.abs()
    fraction = 0.5 if name == "mest" else drop_fraction(0.5, view.step, 100)
    base = int(view.mask.sum()) if name == "snfs" else view.keep
    survive = min(view.keep, base - math.floor(fraction * base + 1e-9))
    if name in GROWS_AT_RANDOM:
        growth = torch.rand(view.mask.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    else:
        growth = growth.float()
    expected = by_loops(view, size, growth, survive)
    assert set(new.flatten().nonzero().flatten().tolist()) == expected


RANKING = {
    "magnitude": Magnitude(sparsity=0.5),
    "ac-dc": ACDC(sparsity=0.5, end_step=100),
    "resu": RESU(sparsity=0.5, end_step=100),
    "ste": STE(sparsity=0.5),
    "top-kast": TopKAST(sparsity=0.5),
    "static": Static(sparsity=0.5, init="magnitude"),
}


@pytest.mark.parametrize("name", RANKING)
@settings(max_examples=40)
@given(data=st.data())
def test_rules_that_rank_keep_the_largest(name, data):
    """What is pruned counts with its θ where there is one; under gradual pruning it ranks below all that is active."""
    view, _, growth, _ = data.draw(layers())
    theta = growth.to(view.weight.dtype).masked_fill(view.mask, 0) if RANKING[name].learns_pruned else None
    view = View(**{**view.__dict__, "theta": theta})
    before = [*copied(view), *([] if theta is None else [theta.clone()])]
    new = RANKING[name].update_mask(view, 0.5, view.step)
    after = [*copied(view), *([] if theta is None else [view.theta])]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    score = view.weight.abs() if theta is None else view.weight.abs() + theta.abs()
    if name == "magnitude":
        score = score.masked_fill(~view.mask, -1.0)
    expected = by_loops(view, score, score, 0)
    assert set(new.flatten().nonzero().flatten().tolist()) == expected
    assert view.pattern.violations(new) == 0


@pytest.mark.parametrize("init", ["random", "magnitude"])
@pytest.mark.parametrize("name", RULES)
def test_the_first_mask_is_exact_and_of_the_kind_asked_for(name, init):
    rule = type(RULES[name])(**{**RULES[name].__dict__, "init": init})
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    pattern = "row" if name == "srigl" else "tensor"
    view = view_of(weight, torch.ones(6, 10), 24, pattern, step=0)
    mask = rule.update_mask(view, 0.6, 0)
    first = mask if name != "mest-soft" else None
    draw = torch.rand(6, 10, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    score = (weight.abs() if init == "magnitude" else draw).flatten().tolist()
    if first is None:
        assert int(mask.sum()) == 36
        assert top(range(60), score, 24) <= set(mask.flatten().nonzero().flatten().tolist())
    else:
        expected = set().union(*(top(where, score, room) for where, room in rooms(view.pattern, (6, 10), 24)))
        assert set(first.flatten().nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("name", RULES)
def test_extremes(name):
    rule, pattern = RULES[name], "row" if name == "srigl" else "tensor"
    for n in (2, 3, 12):
        for keep in {1, n - 1}:
            for weight in (torch.ones(1, n), torch.zeros(1, n), torch.full((1, n), 1e-38), torch.full((1, n), 1e38)):
                for gradient in (torch.zeros(1, n), torch.full((1, n), 1e38), torch.full((1, n), -1e-38)):
                    mask = torch.arange(n).view(1, n) < keep
                    view = view_of(weight, mask, keep, pattern, gradient=gradient, momentum=gradient)
                    count = int(rule.update_mask(view, 0.5, 4).sum())
                    assert count == (min(n, keep + keep // 2) if name == "mest-soft" else keep)


def test_counts_of_what_moves_are_floors_of_the_decimal_that_was_written():
    assert [moved_count(0.29, 100), moved_count(0.57, 100), moved_count(0.3, 9), moved_count(0.0, 9)] == [29, 57, 2, 0]
    assert kept_through(0.29, 100) == 71
    assert [drop_fraction(0.3, t, 90) for t in (0, 30, 45, 60, 90, 91)] == [0.3, 0.225, 0.15, 0.075, 0.0, 0.0]
    assert drop_fraction(0.3, 10**6, None) == 0.3


def test_constant_fan_in_is_that_of_the_neurons_that_are_left():
    rule, row = SRigL(sparsity=0.5), Unstructured("row")
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0]], dtype=torch.bool)
    assert rule.violations(mask, row) == 0  # one row may hold one weight less
    mask[0] = True
    assert rule.violations(mask, row) > 0


def test_snfs_leaves_a_layer_alone_that_never_had_a_gradient():
    rule = SNFS(sparsity=0.5, alpha=0.5)
    weight = torch.arange(1.0, 9).view(2, 4)
    mask = table("..oo o.o.")
    momenta = {"a": torch.ones(2, 4), "b": 3 * torch.ones(2, 4), "none": None, "zero": torch.zeros(2, 4)}
    views = {name: view_of(weight, mask, 4, momentum=momentum) for name, momentum in momenta.items()}
    # Two of four stay in a and b, and of the four that are free b gets three.
    assert rule.redistribute(views) == {"a": 3, "b": 5, "none": 4, "zero": 4}
    for name in ("none", "zero"):
        assert torch.equal(rule.update_mask(views[name], 0.5, 4), mask)
