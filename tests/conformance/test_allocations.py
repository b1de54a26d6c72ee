"""Every registered allocation: exact totals, at least one weight each, never more than there are."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resu.core.counting import keep_count
from resu.pruning.allocation import allocate, allocations

sizes = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple), min_size=1, max_size=7)


@pytest.mark.parametrize("name", allocations)
@settings(max_examples=40)
@given(sizes=sizes, digits=st.integers(0, 999), seed=st.integers(0, 9))
def test_totals_are_exact_and_every_layer_keeps_something(name, sizes, digits, seed):
    shapes = {f"layer{i}.weight": torch.Size(s) for i, s in enumerate(sizes)}
    generator = torch.Generator().manual_seed(seed)
    scores = {k: torch.randn(s, generator=generator).abs() for k, s in shapes.items()}
    sparsity = digits / 1000
    budget = keep_count(sum(map(math.prod, sizes)), sparsity)
    if budget < len(sizes):
        with pytest.raises(ValueError, match="layers"):
            allocate(name, shapes, sparsity, scores)
        return
    keeps = allocate(name, shapes, sparsity, scores)
    assert list(keeps) == list(shapes)
    assert sum(keeps.values()) == budget
    assert all(type(k) is int and 1 <= k <= math.prod(s) for k, s in zip(keeps.values(), sizes, strict=True))
    assert keeps == allocate(name, shapes, sparsity, scores)


@pytest.mark.parametrize("name", allocations)
def test_no_sparsity_is_dense(name):
    shapes = {"a": torch.Size([3, 4]), "b": torch.Size([5, 2, 3, 3])}
    scores = {k: torch.rand(s) for k, s in shapes.items()}
    assert allocate(name, shapes, 0.0, scores) == {"a": 12, "b": 90}


@pytest.mark.parametrize("name", allocations)
def test_more_sparsity_never_keeps_more(name):
    shapes = {"a": torch.Size([30, 40]), "b": torch.Size([50, 20]), "c": torch.Size([5, 5])}
    scores = {k: torch.rand(s, generator=torch.Generator().manual_seed(1)) for k, s in shapes.items()}
    kept = [allocate(name, shapes, s / 20, scores) for s in range(20)]
    for before, after in itertools.pairwise(kept):
        assert all(after[k] <= before[k] + 1 for k in shapes)  # a unit of rounding may move


@pytest.mark.parametrize("name", allocations)
@pytest.mark.parametrize("bad", [-0.1, 1.0, float("nan"), "0.5", None])
def test_input_sparsity_is_checked(name, bad):
    with pytest.raises((ValueError, TypeError), match="sparsity"):
        allocate(name, {"a": torch.Size([3, 3])}, bad, {"a": torch.rand(3, 3)})
