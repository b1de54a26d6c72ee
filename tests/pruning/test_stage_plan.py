import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resu.core.counting import pruned_count
from resu.pruning.stages import plan_stages


@given(st.integers(1, 9999).map(lambda i: i / 10000), st.integers(1, 30))
def test_solved_fractions_multiply_to_the_target(target, count):
    plan = plan_stages(target, count)
    assert len(plan) == len(plan.fractions) == len(plan.sparsities) == count
    left = 1.0
    for fraction, sparsity in plan:
        assert 0 < fraction < 1
        left *= 1 - fraction
        assert 1 - left == pytest.approx(sparsity, abs=1e-9)
    assert plan.sparsities[-1] == target
    assert max(plan.fractions) - min(plan.fractions) < 1e-6


@given(st.lists(st.integers(1, 99).map(lambda i: i / 100), min_size=1, max_size=6))
def test_a_list_is_checked_exactly(fractions):
    reached = 1 - math.prod(1 - Fraction(str(f)) for f in fractions)
    target = round(float(reached), 4)
    if not 0 < target < 1:
        return
    plan = plan_stages(target, fractions)
    assert plan.sparsities[-1] == target
    for wrong in (target - 0.01, target + 0.01):
        if 0 < wrong < 1:
            with pytest.raises(ValueError, match="of what is still active reaches"):
                plan_stages(wrong, fractions)


@given(st.integers(1, 100_000), st.integers(1, 99).map(lambda i: i / 100), st.integers(1, 8))
def test_counts_rise_to_the_exact_one(n, target, count):
    counts = [pruned_count(n, s) for s in plan_stages(target, count).sparsities]
    assert counts == sorted(counts)
    assert counts[-1] == math.floor(n * Fraction(str(target)))


def test_a_list_that_misses_says_the_figure():
    with pytest.raises(ValueError, match=r"reaches only 53\.8 %, not 70 %; plan_stages\(0\.7, 4\)"):
        plan_stages(0.7, [0.2, 0.2, 0.15, 0.15])
    with pytest.raises(ValueError, match=r"reaches only 68\.6 %, not 70 %"):
        plan_stages(0.7, [0.3, 0.3, 0.2, 0.2])
    with pytest.raises(ValueError, match=r"reaches 75 %, not 70 %"):
        plan_stages(0.7, [0.5, 0.5])


def test_a_list_that_meets_the_target_to_its_last_digit_ends_on_it():
    plan = plan_stages(0.7, [0.26] * 4)  # 70.013 %
    assert plan.sparsities[-1] == 0.7
    assert plan.sparsities == pytest.approx(plan_stages(0.7, 4).sparsities, abs=1e-9)
    assert plan_stages(0.55, [0.5, 0.1]).sparsities == (0.5, 0.55)
    assert "0.7000" in str(plan)


@pytest.mark.parametrize(
    ("target", "stages", "error", "said"),
    [
        (0.0, 3, ValueError, "nothing to prune"),
        (1.0, 3, ValueError, "target must lie"),
        (70, 3, ValueError, "a percentage"),
        (0.7, 0, ValueError, "at least one stage"),
        (0.7, [], ValueError, "empty list"),
        (0.7, [0.5, 0.0, 0.4], ValueError, "stage 2 prunes nothing"),
        (0.7, [0.5, 1.0], ValueError, "fraction of stage 2"),
        (0.7, 2.5, TypeError, "number of stages or a list"),
        (0.7, True, TypeError, "number of stages or a list"),
        (0.7, "3", TypeError, "number of stages or a list"),
    ],
)
def test_wrong_input(target, stages, error, said):
    with pytest.raises(error, match=said):
        plan_stages(target, stages)
