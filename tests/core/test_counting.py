"""Exact counts and exact selection."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resu.core import counting
from resu.core.counting import (
    check_finite,
    check_sparsity,
    keep_count,
    largest_remainder,
    pruned_count,
    top_k_mask,
    top_k_rows,
)


def sorted_mask(values: list, keep: int) -> list[bool]:
    """Stable sort by falling score: the statement of what a selection is."""
    order = sorted(range(len(values)), key=lambda i: -values[i])  # stable: ties keep the lower index
    kept = set(order[:keep])
    return [i in kept for i in range(len(values))]


# -- how many ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "sparsity", "pruned"),
    [(100, 0.29, 29), (100, 0.57, 57), (1000, 0.999, 999), (50257 * 4096, 0.9, 185_267_404), (7, 0.0, 0), (3, 0.1, 0)],
)
def test_trap_02_counts_are_those_of_the_decimal_that_was_written(n, sparsity, pruned):
    assert pruned_count(n, sparsity) == pruned
    assert keep_count(n, sparsity) == n - pruned


def test_trap_02_gpt2_embedding_at_ninety_percent():
    assert keep_count(50257 * 4096, 0.9) == 20_585_268  # float32 gives 20 585 272
    assert 50257 * 4096 - math.floor(Fraction(9, 10) * 50257 * 4096) == 20_585_268


@given(n=st.integers(1, 10**12), digits=st.integers(0, 9999))
def test_counts_equal_decimal_arithmetic(n, digits):
    sparsity = digits / 10_000
    expected = int(Decimal(n) * Decimal(digits) / Decimal(10_000))
    assert pruned_count(n, sparsity) == expected
    assert 1 <= keep_count(n, sparsity) <= n


@pytest.mark.parametrize("sparsity", [np.float64(0.29), np.float32(0.29), Fraction(29, 100)])
def test_other_real_numbers_count_as_what_they_print(sparsity):
    assert pruned_count(100, sparsity) == 29


@pytest.mark.parametrize("bad", ["0.5", None, True, [0.5], 0.5j, torch.tensor(0.5)])
def test_input_sparsity_of_another_type_is_an_error(bad):
    with pytest.raises(TypeError, match="must be a number"):
        check_sparsity(bad)


@pytest.mark.parametrize("bad", [-0.1, 1.0, 1.5, math.nan, math.inf, -math.inf])
def test_input_sparsity_out_of_range_is_an_error(bad):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        check_sparsity(bad)


def test_a_percentage_is_recognized():
    with pytest.raises(ValueError, match="divide by 100"):
        check_sparsity(50)


def test_empty_layers_are_an_error_unless_allowed():
    with pytest.raises(ValueError, match="0 elements"):
        keep_count(0, 0.5)
    assert keep_count(0, 0.5, allow_empty=True) == 0
    with pytest.raises(ValueError, match="-1 elements"):
        keep_count(-1, 0.5, allow_empty=True)


# -- shares --------------------------------------------------------------------------------------------


def one_by_one(total, quotas, caps, minimum=1):
    """The definition of the largest remainder within bounds, a unit at a time."""
    low = {k: min(minimum, caps[k]) for k in quotas}
    result = {k: min(max(math.floor(quotas[k]), low[k]), caps[k]) for k in quotas}
    while sum(result.values()) < total:
        open_ = [k for k in quotas if result[k] < caps[k]]
        result[max(open_, key=lambda k: Fraction(quotas[k]) - result[k])] += 1
    while sum(result.values()) > total:
        open_ = [k for k in reversed(quotas) if result[k] > low[k]]
        result[min(open_, key=lambda k: Fraction(quotas[k]) - result[k])] -= 1
    return result


@st.composite
def shares(draw):
    caps = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    quotas = [draw(st.one_of(st.floats(0, 15), st.integers(0, 30).map(lambda i: Fraction(i, 2)))) for _ in caps]
    total = draw(st.integers(len(caps), sum(caps)))
    return total, {str(i): q for i, q in enumerate(quotas)}, {str(i): c for i, c in enumerate(caps)}


@given(shares())
def test_largest_remainder_equals_its_definition(case):
    total, quotas, caps = case
    result = largest_remainder(total, quotas, caps)
    assert result == one_by_one(total, quotas, caps)
    assert sum(result.values()) == total
    assert all(1 <= result[k] <= caps[k] for k in caps)


def test_largest_remainder_far_beyond_the_caps():
    caps = {f"l{i}": 10**9 if i % 2 else 1 for i in range(2000)}
    result = largest_remainder(10**11, dict.fromkeys(caps, 0.5), caps)
    assert sum(result.values()) == 10**11
    assert {result[k] for k in caps if caps[k] > 1} == {(10**11 - 1000) // 1000}


def test_largest_remainder_says_what_cannot_be():
    with pytest.raises(ValueError, match=r"hold between 2 .* and 6"):
        largest_remainder(7, {"a": 1, "b": 1}, {"a": 3, "b": 3})
    assert largest_remainder(0, {}, {}) == {}


# -- which ---------------------------------------------------------------------------------------------

tied = st.lists(st.sampled_from([-1.5, -0.0, 0.0, 0.5, 2.0, math.inf, -math.inf]), min_size=1, max_size=40)


@given(values=st.one_of(tied, st.lists(st.floats(allow_nan=False, width=32), min_size=1, max_size=40)), data=st.data())
def test_selection_equals_a_stable_sort(values, data):
    keep = data.draw(st.integers(0, len(values)))
    assert top_k_mask(torch.tensor(values, dtype=torch.float64), keep).tolist() == sorted_mask(values, keep)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.uint8, torch.bool])
def test_selection_in_every_dtype(dtype):
    scores = torch.tensor([3, 0, 1, 3, 2, 1]).to(dtype)
    for keep in range(7):
        assert top_k_mask(scores, keep).tolist() == sorted_mask(scores.tolist(), keep)


@pytest.mark.parametrize("n", [8, 1000, 100_000])
def test_trap_01_ties_keep_exactly_half(n):
    mask = top_k_mask(torch.full((n,), 0.25), n // 2)
    assert int(mask.sum()) == n // 2
    assert bool(mask[: n // 2].all())


@pytest.mark.parametrize("kind", ["normal", "equal", "mostly zero", "descending", "ascending", "coarse", "two values"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9, 1.0])
def test_long_rows_are_selected_exactly_however_they_lie(kind, share):
    n = 70_001  # above the size from which a sample narrows the selection
    assert n > counting._SAMPLED
    x = torch.randn(n, generator=torch.Generator().manual_seed(1)).abs()
    scores = {
        "normal": x,
        "equal": torch.ones(n),
        "mostly zero": torch.where(x < 1.7, 0, x),
        "descending": x.sort(descending=True).values,
        "ascending": x.sort().values,
        "coarse": (4 * x).round(),
        "two values": (x > 1).to(torch.int64),
    }[kind]
    keep = max(1, int(share * n))
    order = torch.sort(scores, descending=True, stable=True).indices[:keep]
    expected = torch.zeros(n, dtype=torch.bool).index_fill_(0, order, True)
    assert torch.equal(top_k_mask(scores, keep), expected)


def test_a_sample_that_misleads_changes_nothing(monkeypatch):
    # Every drawn index is 0, so the bracket is one value, and wrong.
    monkeypatch.setattr(torch, "randint", lambda n, size, generator: torch.zeros(size, dtype=torch.int64))
    scores = torch.arange(70_000, dtype=torch.float32)
    assert top_k_mask(scores, 10).nonzero().view(-1).tolist() == list(range(69_990, 70_000))


@settings(max_examples=30)
@given(
    rows=st.integers(1, 5),
    n=st.integers(1, 9),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_rows_are_selected_each_on_its_own(rows, n, seed, data):
    scores = torch.randint(0, 4, (rows, n), generator=torch.Generator().manual_seed(seed)).float()
    keeps = data.draw(st.lists(st.integers(0, n), min_size=rows, max_size=rows))
    mask = top_k_rows(scores, keeps)
    assert mask.tolist() == [sorted_mask(row, k) for row, k in zip(scores.tolist(), keeps, strict=True)]
    assert torch.equal(top_k_rows(scores, keeps[0]), torch.stack([top_k_mask(row, keeps[0]) for row in scores]))


def test_rows_need_one_count_each():
    scores = torch.rand(3, 4)
    for keeps in ([2, 2], [1, 2], torch.tensor([[2, 2, 2]])):
        with pytest.raises(ValueError, match="one count per row"):
            top_k_rows(scores, keeps)
    with pytest.raises(ValueError, match=r"\[rows, n\]"):
        top_k_rows(torch.rand(3), 1)


@pytest.mark.parametrize("keep", [-1, 5])
def test_impossible_counts_are_an_error(keep):
    with pytest.raises(ValueError, match=f"cannot keep {keep} of 4"):
        top_k_mask(torch.rand(4), keep)


def test_input_nan_scores_are_an_error_that_counts_them():
    scores = torch.tensor([1.0, math.nan, math.nan])
    with pytest.raises(ValueError, match="2 NaN"):
        top_k_mask(scores, 1)
    with pytest.raises(ValueError, match="2 NaN or infinite values of 3"):
        check_finite(scores, "scores")


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_check_finite_finds_every_kind(bad, dtype):
    x = torch.ones(100, dtype=dtype)
    check_finite(x, "weight")
    x[17] = bad
    with pytest.raises(ValueError, match="weight holds 1 NaN"):
        check_finite(x, "weight")


def test_check_finite_lets_large_sums_and_other_dtypes_pass():
    check_finite(torch.full((1000,), 3e38), "large")
    check_finite(torch.arange(3), "integers")
    check_finite(torch.empty(0), "nothing")


def test_selection_works_where_determinism_is_demanded():
    torch.use_deterministic_algorithms(True)
    try:
        assert int(top_k_mask(torch.rand(1000), 10).sum()) == 10
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_trap_05_positions_of_more_than_a_device_can_index_at_once(size: int) -> None:
    bits = torch.rand(50, generator=torch.Generator().manual_seed(1)) < 0.3
    assert torch.equal(counting._nonzero_in_parts(bits, size), bits.nonzero().view(-1))
