"""Budgets over layers: exact totals, and the papers' formulas."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resu.core.counting import keep_count
from resu.pruning.allocation import (
    allocate,
    allocations,
    erdos_renyi_densities,
    global_masks,
    match_sparsities,
    ranking,
)
from tests.reference import erk

SHAPES = {
    "conv.weight": torch.Size([16, 3, 3, 3]),
    "body.weight": torch.Size([32, 16, 3, 3]),
    "fc.weight": torch.Size([10, 512]),
}


def shapes_of(sizes):
    return {f"l{i}.weight": torch.Size(size) for i, size in enumerate(sizes)}


some_shapes = st.lists(st.lists(st.integers(1, 12), min_size=2, max_size=4).map(tuple), min_size=1, max_size=6).map(
    shapes_of
)


@settings(max_examples=100)
@given(shapes=some_shapes, digits=st.integers(0, 98), kernel=st.booleans())
def test_er_and_erk_densities_are_the_papers(shapes, digits, kernel):
    found = erdos_renyi_densities(shapes, digits / 100, kernel=kernel)
    expected = erk.densities(shapes, digits / 100, kernel)
    assert {k: float(d) for k, d in found.items()} == pytest.approx(expected, abs=1e-6)
    sizes = {k: math.prod(s) for k, s in shapes.items()}
    total = sum(sizes.values())
    assert sum(found[k] * n for k, n in sizes.items()) == total * (1 - Fraction(digits, 100))  # without rounding


@settings(max_examples=60)
@given(shapes=some_shapes, digits=st.integers(0, 98), name=st.sampled_from(["er", "erk"]))
def test_er_and_erk_counts_are_the_densities_rounded(shapes, digits, name):
    total = sum(math.prod(s) for s in shapes.values())
    if keep_count(total, digits / 100) < len(shapes):
        with pytest.raises(ValueError, match="cannot place"):
            allocate(name, shapes, digits / 100)
        return
    keeps = allocate(name, shapes, digits / 100)
    assert sum(keeps.values()) == keep_count(total, digits / 100)
    # The budget is an integer; the paper's formula with exactly that budget.
    exact = 1 - Fraction(keep_count(total, digits / 100), total)
    wished = {k: d * math.prod(shapes[k]) for k, d in erk.densities(shapes, float(exact), name == "erk").items()}
    for key in shapes:
        # At least one weight each may take a unit from others.
        slack = 1 if all(w >= 1 for w in wished.values()) else 1 + len(shapes)
        assert abs(keeps[key] - wished[key]) < slack + 1e-6, key


def resnet50():
    """Shapes of a ResNet-50."""
    shapes, width = {"conv1": (64, 3, 7, 7)}, 64
    for stage, (blocks, mid) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)]):
        for i in range(blocks):
            prefix = f"layer{stage + 1}.{i}"
            shapes |= {f"{prefix}.conv1": (mid, width, 1, 1), f"{prefix}.conv2": (mid, mid, 3, 3)}
            shapes[f"{prefix}.conv3"] = (4 * mid, mid, 1, 1)
            if i == 0:
                shapes[f"{prefix}.downsample"] = (4 * mid, width, 1, 1)
            width = 4 * mid
    return {k: torch.Size(s) for k, s in (shapes | {"fc": (1000, width)}).items()}


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.95, 0.98])
def test_erk_of_a_large_network_with_layers_forced_dense(sparsity):
    shapes = resnet50()
    expected = erk.densities(shapes, sparsity)
    assert (sum(d == 1 for d in expected.values()) > 0) == (sparsity < 0.95)
    found = {k: float(d) for k, d in erdos_renyi_densities(shapes, sparsity).items()}
    assert found == pytest.approx(expected, abs=1e-6)
    keeps = allocate("erk", shapes, sparsity)
    assert all(abs(keeps[k] - expected[k] * shapes[k].numel()) < 1.001 for k in shapes)


def test_erk_without_a_solution_says_so():
    shapes = shapes_of([(3, 3), (4, 4), (5, 5)])
    with pytest.raises(ValueError, match=r"cannot place 2 kept weights: these 3 layers hold between 3 .* and 50"):
        allocate("erk", shapes, 0.96)


def test_erk_of_a_small_network_by_hand():
    # Σdims = 25, 54, 522; K = 1024 of 10 160... ε = K / Σ Σdims unless a layer overflows.
    keeps = allocate("erk", SHAPES, 0.9)
    total = sum(math.prod(s) for s in SHAPES.values())
    budget = keep_count(total, 0.9)
    epsilon = Fraction(budget, 25 + 54 + 522)
    assert sum(keeps.values()) == budget
    assert [abs(keeps[k] - epsilon * d) < 1 for k, d in zip(SHAPES, (25, 54, 522), strict=True)] == [True] * 3


def test_erk_makes_layers_dense_that_would_overflow():
    keeps = allocate("erk", {"tiny.weight": torch.Size([2, 2]), "big.weight": torch.Size([100, 100])}, 0.5)
    assert keeps == {"tiny.weight": 4, "big.weight": 4998}


def test_erk_ties_at_the_maximum_and_all_dense():
    shapes = shapes_of([(2, 2), (2, 2), (50, 50)])
    assert list(allocate("erk", shapes, 0.2).values())[:2] == [4, 4]
    assert allocate("erk", shapes, 0.0) == {k: math.prod(s) for k, s in shapes.items()}


@settings(max_examples=60)
@given(shapes=some_shapes, digits=st.integers(0, 99), seed=st.integers(0, 99), levels=st.sampled_from([None, 3]))
def test_global_is_the_top_k_of_everything_together(shapes, digits, seed, levels):
    generator = torch.Generator().manual_seed(seed)
    draw = (
        (lambda s: torch.randn(s, generator=generator))
        if levels is None
        else (lambda s: torch.randint(0, levels, s, generator=generator).float())
    )
    scores = {k: draw(s) for k, s in shapes.items()}
    total = sum(s.numel() for s in scores.values())
    budget = keep_count(total, digits / 100)
    if budget < len(shapes):
        with pytest.raises(ValueError, match="fewer than the"):
            allocate("global", shapes, digits / 100, scores)
        return
    masks = global_masks(scores, digits / 100)
    keeps = allocate("global", shapes, digits / 100, scores)
    assert keeps == {k: int(m.sum()) for k, m in masks.items()}
    assert sum(keeps.values()) == budget
    flat = torch.cat([s.view(-1) for s in scores.values()])
    order = torch.sort(flat, descending=True, stable=True).indices[:budget]
    plain = torch.zeros(total, dtype=torch.bool).index_fill_(0, order, True).split([s.numel() for s in scores.values()])
    counts = [int(part.sum()) for part in plain]
    if all(counts):
        assert list(keeps.values()) == counts
        assert all(torch.equal(m.view(-1), p) for m, p in zip(masks.values(), plain, strict=True))


def test_trap_09_global_ranking_never_empties_a_layer():
    scores = {"a": torch.rand(100) + 1, "b": torch.rand(20) * 1e-3, "c": torch.rand(5) * 1e-6}
    masks = global_masks({k: s.view(1, -1) for k, s in scores.items()}, 0.9)
    assert {k: int(m.sum()) for k, m in masks.items()} == {"a": 11, "b": 1, "c": 1}
    for name in ("b", "c"):
        assert masks[name].view(-1).nonzero().item() == int(scores[name].argmax())


def test_trap_05_global_ranking_of_more_than_two_to_the_24():
    n = (1 << 24) + 3
    scores = {"a": torch.zeros(1, n, dtype=torch.uint8), "b": torch.ones(1, 1, dtype=torch.bfloat16)}
    scores["a"][0, -5:] = 2
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(scores["a"].float(), 0.5)
    keeps = allocate("global", {k: s.shape for k, s in scores.items()}, 0.5, scores)
    assert keeps == {"a": keep_count(n + 1, 0.5) - 1, "b": 1}
    mask = global_masks(scores, 0.5)["a"]
    assert mask[0, -5:].all()
    assert mask[0, : keeps["a"] - 5].all()  # the lowest indices of the ties
    assert int(mask.sum()) == keeps["a"]


KINDS = ["normal", "ties", "coarse", "mixed", "wide and narrow"]


@pytest.mark.parametrize("sample", [64, 1 << 16])
@settings(max_examples=30)
@given(shapes=some_shapes, digits=st.integers(0, 99), seed=st.integers(0, 99), kind=st.sampled_from(KINDS))
def test_global_ranking_in_chunks_is_the_same(sample, shapes, digits, seed, kind):
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for i, (name, shape) in enumerate(shapes.items()):
        x = torch.randn(shape, generator=generator)
        if kind == "ties":
            x = x.sign()
        elif kind == "coarse":
            x = x.to(torch.bfloat16)
        elif kind == "mixed":
            x = (10 * x).round().to([torch.float32, torch.float64, torch.int32, torch.float16][i % 4])
        elif kind == "wide and narrow":
            x = x.double() + 1e-12 if i % 2 else x
        scores[name] = x
    total = sum(s.numel() for s in scores.values())
    if keep_count(total, digits / 100) < len(shapes):
        return
    joined = {k: s.double() for k, s in scores.items()}
    expected = global_masks(joined, digits / 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "_JOINED", 0)
        patch.setattr(ranking, "_CHUNK", 5)
        patch.setattr(ranking, "_SAMPLE", sample)
        masks = global_masks(scores, digits / 100)
        keeps = allocate("global", shapes, digits / 100, scores)
    assert all(torch.equal(masks[k], expected[k]) for k in shapes)
    assert keeps == {k: int(m.sum()) for k, m in expected.items()}


def test_a_sample_that_misleads_does_not_change_the_global_ranking(monkeypatch):
    scores = {"a": torch.arange(50.0).view(5, 10), "b": torch.arange(50.0, 100.0).view(10, 5)}
    monkeypatch.setattr(ranking, "_JOINED", 0)
    monkeypatch.setattr(torch, "randint", lambda n, size, generator: torch.zeros(size, dtype=torch.int64))
    assert allocate("global", {k: s.shape for k, s in scores.items()}, 0.4, scores) == {"a": 10, "b": 50}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_global_refuses_scores_that_are_not_finite(bad):
    scores = {"a": torch.tensor([[1.0, bad]])}
    with pytest.raises(ValueError, match="scores of 'a' hold 1 NaN"):
        allocate("global", {"a": torch.Size([1, 2])}, 0.5, scores)


def test_global_says_whose_scores_are_missing_or_misshapen():
    with pytest.raises(ValueError, match=r"none given for \['fc.weight'\]"):
        allocate("global", SHAPES, 0.5, {k: torch.rand(s) for k, s in SHAPES.items() if k != "fc.weight"})
    with pytest.raises(ValueError, match="none given for"):
        allocate("global", SHAPES, 0.5)
    with pytest.raises(ValueError, match=r"scores of 'fc.weight' have shape \(2,\)"):
        allocate("global", SHAPES, 0.5, {k: torch.rand(s) for k, s in SHAPES.items()} | {"fc.weight": torch.rand(2)})


def test_a_mapping_gives_each_layer_its_own_exact_count():
    keeps = allocate({"conv": 0.29, "*.weight": 0.5}, SHAPES, 0.0)
    assert keeps == {"conv.weight": 432 - 125, "body.weight": 4608 // 2, "fc.weight": 5120 // 2}
    assert allocate({"fc": 0.9}, SHAPES, 0.5) == {"conv.weight": 432, "body.weight": 4608, "fc.weight": 512}


def test_trap_13_globs_of_a_mapping_must_match():
    with pytest.raises(ValueError, match=r"the glob 'head' matches no layer; layers are: conv.weight"):
        allocate({"head": 0.5}, SHAPES, 0.0)
    with pytest.raises(ValueError, match="sparsity of 'fc' must lie"):
        allocate({"fc": 1.5}, SHAPES, 0.0)
    with pytest.raises(ValueError, match="empty"):
        match_sparsities({}, SHAPES)


def test_a_function_of_ones_own_is_checked():
    assert allocate(lambda shapes, sparsity, scores: dict.fromkeys(shapes, 7), SHAPES, 0.5)["fc.weight"] == 7
    for wrong in (dict.fromkeys(SHAPES, 0), dict.fromkeys(SHAPES, 0.5), dict.fromkeys(SHAPES, 10**9), {"x": 1}):
        with pytest.raises(ValueError, match="the distribution"):
            allocate(lambda shapes, sparsity, scores, wrong=wrong: wrong, SHAPES, 0.5)


def test_bad_input_is_said():
    with pytest.raises(ValueError, match="unknown distribution 'edk'; known: er, erk, global, lamp, owl, uniform"):
        allocate("edk", SHAPES, 0.5)
    with pytest.raises(TypeError, match="distribution must be"):
        allocate(0.5, SHAPES, 0.5)
    with pytest.raises(ValueError, match="no layer"):
        allocate("erk", {}, 0.5)
    with pytest.raises(ValueError, match="layer 'a' has no weights"):
        allocate("erk", {"a": torch.Size([0, 3])}, 0.5)
    with pytest.raises(ValueError, match="must lie in"):
        allocate("erk", SHAPES, 1.0)


def test_an_allocation_of_ones_own_is_known_by_name():
    @allocations.register("first only")
    def first_only(shapes, sparsity, scores=None):
        return {k: math.prod(s) if i else 1 for i, (k, s) in enumerate(shapes.items())}

    try:
        assert allocate("first only", SHAPES, 0.5)["conv.weight"] == 1
    finally:
        del allocations._items["first only"]


def test_thousands_of_layers():
    shapes = shapes_of([(7 + i % 50, 3 + i % 31, 3, 3) for i in range(3000)])
    for name in ("uniform", "er", "erk"):
        assert sum(allocate(name, shapes, 0.9).values()) == keep_count(sum(map(math.prod, shapes.values())), 0.9)
