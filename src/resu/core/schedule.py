"""Schedules (a value at a step) and cadences (whether a step is due): plain frozen callables."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Protocol

from resu.core.registry import Registry

__all__ = ["Cadence", "Constant", "Cosine", "Cubic", "Every", "Linear", "Schedule", "check_steps", "schedules"]


def check_steps(**steps: int | None) -> None:
    """Raise ``TypeError`` if one of the named numbers of steps is neither whole nor None.

    A fraction would not be told from a step: ``end_step=0.75`` ends before the first one.

    Example:
        >>> check_steps(interval=100, end_step=None)
    """
    for name, value in steps.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise TypeError(f"{name} is counted in steps and must be a whole number, got {value!r}; write int(…)")


class Schedule(Protocol):
    """A value at a step."""

    def __call__(self, step: int) -> float:
        """The value at ``step``."""
        ...


class Cadence(Protocol):
    """Whether something is due at a step."""

    def __call__(self, step: int) -> bool:
        """True if ``step`` is due."""
        ...


@dataclass(frozen=True)
class Constant:
    """The same value at every step."""

    value: float

    def __call__(self, step: int) -> float:
        """The value, whatever the step."""
        return self.value


# `linear`, `cubic`, `cosine`: classes made as ``(start, end, begin_step, end_step)``.
schedules: Registry[type[_Ramp]] = Registry("schedule")


@dataclass(frozen=True)
class _Ramp:
    """From ``start`` at ``begin_step`` to exactly ``end`` at ``end_step`` and ever after."""

    start: float
    end: float
    begin_step: int
    end_step: int

    def __post_init__(self) -> None:
        check_steps(begin_step=self.begin_step, end_step=self.end_step)
        if not 0 <= self.begin_step <= self.end_step:
            raise ValueError(f"a schedule needs 0 <= begin_step <= end_step, got {self.begin_step} and {self.end_step}")

    def _shape(self, progress: float) -> float:
        raise TypeError("use Linear, Cubic or Cosine")

    def __call__(self, step: int) -> float:
        """The value at ``step``."""
        # The ends are returned as given, not computed: a schedule to 0.9 ends at 0.9, bit for bit.
        if step >= self.end_step:
            return self.end
        if step <= self.begin_step:
            return self.start
        progress = (step - self.begin_step) / (self.end_step - self.begin_step)
        # Twelve decimals: a third of the way to 0.9 is 0.3 and not 0.29999999999999993, whose count is one less.
        return round(self.end + (self.start - self.end) * self._shape(progress), 12)


@schedules.register("linear")
@dataclass(frozen=True)
class Linear(_Ramp):
    """Straight line from ``start`` to ``end``."""

    def _shape(self, progress: float) -> float:
        return 1.0 - progress


@schedules.register("cubic")
@dataclass(frozen=True)
class Cubic(_Ramp):
    """``s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n Δt))^3`` (Zhu & Gupta, arXiv 1710.01878, eq. 1).

    Example:
        >>> ramp = Cubic(0.0, 0.9, begin_step=0, end_step=100)
        >>> ramp(0), ramp(50), ramp(100), ramp(1000)
        (0.0, 0.7875, 0.9, 0.9)
    """

    def _shape(self, progress: float) -> float:
        return (1.0 - progress) ** 3


@schedules.register("cosine")
@dataclass(frozen=True)
class Cosine(_Ramp):
    """Half a cosine from ``start`` to ``end``."""

    def _shape(self, progress: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Every:
    """Due at ``begin_step``, ``begin_step + interval``, … up to and including ``end_step``.

    ``end_step`` itself is always due (so that a schedule ends exactly), whatever the interval.

    Example:
        >>> due = Every(10, begin_step=0, end_step=25)
        >>> [t for t in range(40) if due(t)]
        [0, 10, 20, 25]
    """

    interval: int
    begin_step: int = 0
    end_step: int | None = None

    def __post_init__(self) -> None:
        check_steps(interval=self.interval, begin_step=self.begin_step, end_step=self.end_step)
        if self.interval < 1:
            raise ValueError(f"interval must be at least 1, got {self.interval}")
        if self.begin_step < 0 or (self.end_step is not None and self.end_step < self.begin_step):
            raise ValueError(f"need 0 <= begin_step <= end_step, got {self.begin_step} and {self.end_step}")

    def __call__(self, step: int) -> bool:
        """True if ``step`` is due."""
        if step < self.begin_step or (self.end_step is not None and step > self.end_step):
            return False
        return step == self.end_step or (step - self.begin_step) % self.interval == 0
