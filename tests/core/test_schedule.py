"""Schedules end where they say, and cadences are due when they say."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resu.core.schedule import Constant, Cosine, Cubic, Every, Linear, schedules

values = st.floats(0, 0.99)


@given(
    start=values,
    end=values,
    begin=st.integers(0, 50),
    length=st.integers(0, 100),
    name=st.sampled_from(list(schedules)),
)
def test_trap_19_ramps_begin_and_end_bit_exactly_and_never_turn(start, end, begin, length, name):
    ramp = schedules[name](start, end, begin, begin + length)
    assert ramp(begin + length) == ramp(begin + length + 1000) == end
    if length:
        assert ramp(begin) == start
    path = [ramp(t) for t in range(begin + length + 1)]
    if length:
        steps = [b - a for a, b in itertools.pairwise(path)]
        direction = 1 if end >= start else -1
        assert all(direction * step >= -1e-12 for step in steps)
        assert all(min(start, end) - 1e-12 <= v <= max(start, end) + 1e-12 for v in path)


def test_cubic_is_the_papers_formula():
    ramp = Cubic(0.1, 0.9, 10, 110)
    for t in range(10, 110):
        assert ramp(t) == pytest.approx(0.9 + (0.1 - 0.9) * (1 - (t - 10) / 100) ** 3, abs=1e-15)


def test_middles():
    assert Linear(0.0, 1.0, 0, 10)(5) == 0.5
    assert Cosine(1.0, 0.0, 0, 10)(5) == pytest.approx(0.5)
    assert Constant(0.3)(10**9) == 0.3


def test_a_ramp_that_ends_before_it_begins_is_an_error():
    for begin, end in ((5, 4), (-1, 4)):
        with pytest.raises(ValueError, match="begin_step <= end_step"):
            Linear(0, 1, begin, end)
    with pytest.raises(ValueError, match="unknown schedule 'exp'; known: cosine, cubic, linear"):
        schedules["exp"]


@given(interval=st.integers(1, 20), begin=st.integers(0, 30), length=st.one_of(st.none(), st.integers(0, 60)))
def test_due_steps(interval, begin, length):
    end = None if length is None else begin + length
    due = [t for t in range(120) if Every(interval, begin, end)(t)]
    last = 119 if end is None else end
    expected = set(range(begin, last + 1, interval)) | ({end} if end is not None and end < 120 else set())
    assert due == sorted(expected)


def test_cadences_that_cannot_be():
    with pytest.raises(ValueError, match="interval"):
        Every(0)
    with pytest.raises(ValueError, match="begin_step"):
        Every(1, 5, 4)


@pytest.mark.parametrize("steps", [{"interval": 2.5}, {"interval": True}, {"end_step": 0.75}, {"begin_step": "1"}])
def test_steps_are_whole_numbers(steps):
    with pytest.raises(TypeError, match=f"{next(iter(steps))} is counted in steps and must be a whole number"):
        Every(**{"interval": 10, **steps})
    with pytest.raises(TypeError, match="write int"):
        Cubic(0.0, 0.9, 0, 7.5)
