"""The search for how much to remove: the smallest step that is enough, found with few looks at the cost."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resu.pruning.structured.target import smallest_step


def looked(costs):
    seen = []

    def cost(step):
        seen.append(step)
        return costs(step)

    return cost, seen


@given(st.lists(st.integers(0, 30), min_size=2, max_size=300), st.integers(-1, 31))
def test_the_smallest_step_that_is_enough(costs, wanted):
    costs = sorted(costs, reverse=True)
    cost, seen = looked(costs.__getitem__)
    high = len(costs) - 1
    found = smallest_step(cost, high, wanted)
    assert found == next((step for step, value in enumerate(costs) if value <= wanted), high)
    assert len(seen) <= 2 * math.log2(high) + 4 if high else 1


@given(st.floats(0.3, 4), st.floats(0.05, 0.95), st.integers(2, 1 << 24))
def test_costs_of_any_curve_are_met_in_few_looks(power, wanted, high):
    cost, seen = looked(lambda step: 1 - (step / high) ** power)
    found = smallest_step(cost, high, wanted)
    assert cost(found) <= wanted < cost(found - 1)
    assert len(seen) <= 2 * math.log2(high) + 6


@pytest.mark.parametrize("wanted", [0.3, 0.5, 0.8])
def test_what_is_nearly_straight_and_close_enough_takes_two_or_three_looks(wanted):
    cost, seen = looked(lambda step: 1 - 0.9 * (step / 1024) + 0.02 * math.sin(step))
    found = smallest_step(cost, 1024, wanted, 0.03)
    assert abs(cost(found) - wanted) < 0.03
    assert len(seen) <= 5


def test_noise_neither_stalls_nor_breaks_it():
    cost, seen = looked(lambda step: 1 - step / 1024 + 0.3 * math.sin(12.9898 * step) * (0 < step < 1024))
    assert 0 < smallest_step(cost, 1024, 0.5, 1e-6) <= 1024
    assert len(seen) <= 24
