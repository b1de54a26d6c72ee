"""Arithmetic on series: moving averages that lag like heat does, integrals, and scaling by a training part."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "integral", "lagged", "per_sequence", "scaled"]

Array = NDArray[np.float64]


def lagged(x: Array, tau: float, dt: float) -> Array:
    """The answer of a first-order system with time constant ``tau`` to ``x``: ``τ dy/dt + y = x``, ``y(0) = x(0)``.

    Exact where ``x`` is constant over each step; causal, so that a live machine can compute it.

    Args:
        x: ``[time]`` or ``[time, channels]``, evenly spaced.
        tau: Time constant, in the unit of ``dt``.
        dt: Spacing.

    Example:
        >>> lagged(np.array([0.0, 1.0, 1.0]), tau=1.0, dt=1.0).round(3)
        array([0.   , 0.632, 0.865])
    """
    if not tau > 0 or not dt > 0:
        raise ValueError(f"a time constant and a spacing are positive, got tau={tau!r} and dt={dt!r}")
    gain = -np.expm1(-dt / tau)
    out = np.empty_like(x, dtype=np.float64)
    state = np.asarray(x[0], dtype=np.float64)
    for k in range(len(x)):
        state = state + gain * (x[k] - state)
        out[k] = state
    return out


def integral(x: Array, time: Array) -> Array:
    """``∫ x dt`` from the first sample on, by the trapezoidal rule; ``[time, …]``.

    Example:
        >>> integral(np.array([0.0, 2.0, 2.0]), np.array([0.0, 1.0, 3.0]))
        array([0., 1., 5.])
    """
    steps = np.diff(time).reshape(-1, *([1] * (x.ndim - 1)))
    return np.concatenate([np.zeros_like(x[:1]), np.cumsum((x[1:] + x[:-1]) / 2 * steps, axis=0)])


def per_sequence(sequence: NDArray[np.int64], *columns: Array) -> list[list[Array]]:
    """``columns`` cut where ``sequence`` changes: one list of pieces per sequence, in order.

    Raises:
        ValueError: If the rows of a sequence do not lie together.
    """
    starts = np.flatnonzero(np.r_[True, sequence[1:] != sequence[:-1]])
    if len(np.unique(sequence)) != len(starts):
        raise ValueError("the rows of a sequence must lie together, in the order of time")
    ends = [*starts[1:], len(sequence)]
    return [[column[a:b] for column in columns] for a, b in zip(starts, ends, strict=True)]


def scaled(x: Array, train: NDArray[np.int64], spread: float = 1.0, limit: float = 5.0) -> Array:
    """Columns shifted and scaled by mean and standard deviation of the rows ``train``, and held within ``±limit``.

    A column that is constant in training becomes 0. Nothing outside ``train`` has a say.

    Args:
        x: ``[rows, columns]``.
        train: Indices of the rows that count.
        spread: Standard deviation of the result.
        limit: In standard deviations: a sensor that jumps must not carry a prediction away.
    """
    mean, sd = x[train].mean(0), x[train].std(0)
    z = (x - mean) / np.where(sd > 1e-12 * (1 + np.abs(mean)), sd, np.inf)
    found: Array = spread * np.clip(z, -limit, limit)
    return found
