"""Masks combined and compared, against Python's own sets of positions."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resu.core.mask import SparseMask, count_bits
from resu.pruning.mask_ops import diff_masks, invert_mask, mask_difference, mask_intersection, mask_union

shapes = st.lists(st.integers(0, 17), min_size=0, max_size=3).map(tuple)
OPERATIONS = [
    (mask_union, set.union),
    (mask_intersection, set.intersection),
    (mask_difference, set.difference),
]


def random_bool(shape, seed, p=0.5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < p


def positions(mask):
    """Flat positions that are kept, as a set; nothing of the library under test is used."""
    return {index for index, kept in enumerate(mask.reshape(-1).tolist()) if kept}


@pytest.mark.parametrize(("operation", "on_sets"), OPERATIONS)
@given(shape=shapes, seed=st.integers(0, 999), p=st.sampled_from([0.0, 0.2, 0.7, 1.0]))
def test_operations_are_those_of_sets(operation, on_sets, shape, seed, p):
    a, b = random_bool(shape, seed, p), random_bool(shape, seed + 1)
    expected = on_sets(positions(a), positions(b))
    as_bool = operation(a, b)
    assert as_bool.dtype == torch.bool
    assert as_bool.shape == a.shape
    assert positions(as_bool) == expected
    packed = operation(SparseMask(a), SparseMask(b))
    assert isinstance(packed, SparseMask)
    assert packed == SparseMask(as_bool)  # padding bits too
    assert packed.n_active == len(expected)


@given(shape=shapes, seed=st.integers(0, 999))
def test_inversion_keeps_what_was_pruned(shape, seed):
    a = random_bool(shape, seed)
    assert positions(invert_mask(a)) == set(range(a.numel())) - positions(a)
    inverted = invert_mask(SparseMask(a))
    assert inverted == SparseMask(~a)
    assert inverted.n_active == a.numel() - int(a.sum())
    assert invert_mask(inverted) == SparseMask(a)


@given(shape=shapes, seed=st.integers(0, 999), p=st.sampled_from([0.0, 0.3, 1.0]), q=st.sampled_from([0.0, 0.6, 1.0]))
def test_differences_are_counted_as_sets_count_them(shape, seed, p, q):
    before = {"a": random_bool(shape, seed, p), "b": random_bool((5, 11), seed + 1, q)}
    after = {"b": SparseMask(random_bool((5, 11), seed + 2)), "a": random_bool(shape, seed + 3, q)}
    found = diff_masks(before, after)
    json.dumps(found)
    assert list(found["per_layer"]) == ["a", "b"]
    totals = dict.fromkeys(found["global"], 0)
    for name, each in found["per_layer"].items():
        x = positions(before[name])
        y = positions(after[name].mask if isinstance(after[name], SparseMask) else after[name])
        assert each == {
            "numel": before[name].numel(),
            "kept_before": len(x),
            "kept_after": len(y),
            "born": len(y - x),
            "dead": len(x - y),
            "common": len(x & y),
            "hamming": len(x ^ y),
            "churn": len(x ^ y) / (len(x) + len(y)) if x or y else 0.0,
            "jaccard": len(x & y) / len(x | y) if x or y else 1.0,
        }
        totals = {key: totals[key] + each[key] for key in totals}
    either = totals["kept_before"] + totals["kept_after"] - totals["common"]
    kept = totals["kept_before"] + totals["kept_after"]
    assert found["global"] == {
        **totals,
        "churn": totals["hamming"] / kept if kept else 0.0,
        "jaccard": totals["common"] / either if either else 1.0,
    }


def test_what_goes_in_comes_out():
    a, b = random_bool((3, 5), 0), random_bool((3, 5), 1)
    assert isinstance(mask_union(a, SparseMask(b)), torch.Tensor)
    assert isinstance(mask_union(SparseMask(a), b), SparseMask)
    found = mask_difference({"x": a, "y": SparseMask(a)}, {"x": SparseMask(b), "y": b})
    assert torch.equal(found["x"], a & ~b)
    assert found["y"] == SparseMask(a & ~b)
    assert list(invert_mask({"x": a})) == ["x"]


def test_operands_are_left_alone():
    a, b = SparseMask(random_bool((3, 5), 0)), SparseMask(random_bool((3, 5), 1))
    bits = a.packed.clone(), b.packed.clone()
    for operation, _ in OPERATIONS:
        operation(a, b)
    invert_mask(a)
    diff_masks({"w": a}, {"w": b})
    assert torch.equal(a.packed, bits[0])
    assert torch.equal(b.packed, bits[1])


@pytest.mark.parametrize("call", [mask_union, mask_intersection, mask_difference, diff_masks])
def test_input_names_and_shapes_that_differ_are_listed(call):
    a, b = random_bool((2, 3), 0), random_bool((3, 2), 0)
    with pytest.raises(ValueError, match="only in the first: 'v', 'w'; only in the second: 'x'"):
        call({"w": a, "v": a, "s": a}, {"x": a, "s": a})
    with pytest.raises(ValueError, match=r"mask 'w' has shape \(2, 3\) and \(3, 2\)"):
        call({"w": a}, {"w": b})
    with pytest.raises(TypeError, match="mask 'w': SparseMask needs a bool tensor"):
        call({"w": a.float()}, {"w": a})


def test_input_what_is_no_mask_is_refused():
    a = random_bool((2, 3), 0)
    with pytest.raises(TypeError, match="two masks or two mappings"):
        mask_union(a, {"w": a})
    with pytest.raises(TypeError, match=r"must be a mask .* got list"):
        mask_union([True], a)
    with pytest.raises(TypeError, match="bool tensor"):
        invert_mask(a.int())
    with pytest.raises(TypeError, match="must be a mapping"):
        diff_masks(a, a)
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\)"):
        mask_union(a, a.t())


@given(seed=st.integers(0, 99), rows=st.integers(0, 5), width=st.integers(0, 40))
def test_bits_are_counted_by_row(seed, rows, width):
    packed = torch.randint(0, 256, (rows, width), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    expected = [sum(bin(byte).count("1") for byte in row) for row in packed.tolist()]
    assert count_bits(packed).tolist() == expected
    assert count_bits(torch.full((1, 300), 255, dtype=torch.uint8)).item() == 2400  # more than a byte holds
