"""Selective updates of θ: only coordinates whose gradient is large and keeps its sign are moved.

Per coordinate with gradient g (``algorithms.md``, QRESU-Selective)::

    m <- β m + (1 - β) g        v <- β v + (1 - β) |g|        C = |m| / (v + δ)
    screened  = the ⌈k_screen · p⌉ largest |g|        consistent = {C > τ}
    selected  = the ⌈k_select · p⌉ largest |g| among screened ∩ consistent (may be fewer)
    θ_sel <- θ_sel - lr · (C · g + weight_decay · θ)_sel        all other coordinates keep their bits
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from fractions import Fraction
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from resu.core.bits import chunk_on
from resu.core.counting import positions, top_k_mask

__all__ = [
    "SelectionConfig",
    "SelectionStats",
    "consistency",
    "select",
    "selective_update_",
    "share",
    "update_averages_",
]

_CHUNK = 1 << 16


@dataclass(frozen=True)
class SelectionConfig:
    """How coordinates of θ are chosen.

    Args:
        beta: Decay of the moving averages, in [0, 1).
        delta: Added to the denominator of the consistency, > 0.
        tau_stable: Consistency above which a coordinate counts as stable, in [0, 1).
        k_screen_ratio: Share of coordinates that pass the screening by |g|, in (0, 1].
        k_select_ratio: Share of coordinates that are updated at most, in (0, 1].

    Raises:
        TypeError: If a value is not a number.
        ValueError: If a value is out of range.
    """

    beta: float = 0.9
    delta: float = 1e-8
    tau_stable: float = 0.5
    k_screen_ratio: float = 0.5
    k_select_ratio: float = 0.2

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{field.name} must be a number, got {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"{field.name} must be finite, got {value!r}")
        for name in ("beta", "tau_stable"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)!r}")
        if not self.delta > 0.0:
            raise ValueError(f"delta must be > 0, got {self.delta!r}")
        for name in ("k_screen_ratio", "k_select_ratio"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in (0, 1], got {getattr(self, name)!r}")


class SelectionStats(NamedTuple):
    """What one update did.

    Attributes:
        mean_consistency: Mean of C over all coordinates (0 if there are none).
        n_selected: Coordinates moved.
        n_total: Coordinates there are.
    """

    mean_consistency: float
    n_selected: int
    n_total: int

    @property
    def selection_ratio(self) -> float:
        """Share of coordinates moved."""
        return self.n_selected / self.n_total if self.n_total else 0.0


def share(n: int, ratio: float) -> int:
    """``⌈ratio · n⌉`` with the ratio read as the decimal the user wrote.

    Example:
        >>> share(10, 0.2), share(100, 0.07), share(7, 0.5)
        (2, 7, 4)
    """
    return math.ceil(n * Fraction(str(ratio)))


def update_averages_(m: Tensor, v: Tensor, grad: Tensor, beta: float) -> None:
    """Move the averages of g (``m``) and of |g| (``v``) in place."""
    m.mul_(beta).add_(grad, alpha=1.0 - beta)
    v.mul_(beta).add_(grad.abs(), alpha=1.0 - beta)


def consistency(m: Tensor, v: Tensor, delta: float) -> Tensor:
    """``|m| / (v + δ)``, in [0, 1]: 1 where the gradient never changed its sign."""
    return m.abs() / (v + delta)


def select(grad: Tensor, stability: Tensor, config: SelectionConfig) -> Tensor:
    """Flat int64 indices (ascending) of the coordinates to move.

    Args:
        grad: ``[p]``, finite.
        stability: ``[p]``, from :func:`consistency`.
        config: Ratios and threshold.

    Returns:
        At most ``⌈k_select · p⌉`` indices; among equal |g| the lower index goes first.

    Example:
        >>> g = torch.tensor([3.0, -2.0, 1.0, 0.5])
        >>> select(g, torch.tensor([0.1, 0.9, 0.9, 0.9]), SelectionConfig(k_select_ratio=0.5))
        tensor([1])
    """
    n, size = grad.numel(), grad.abs()
    screen, limit = share(n, config.k_screen_ratio), share(n, config.k_select_ratio)
    chosen = stability > config.tau_stable
    # The screened ones are the head of all coordinates in order of |g|, so the best of the consistent ones
    # may be taken first, and a second selection is needed only where the screening cuts into them.
    count = int(torch.count_nonzero(chosen))
    if count <= limit:
        index = positions(chosen)
    elif count <= n // 2:
        index = positions(chosen)
        index = index.index_select(0, positions(top_k_mask(size.index_select(0, index), limit)))
    else:  # indices of so many would take more room than the values
        index = positions(top_k_mask(_zero_unless(chosen, size), limit))
    if screen < n and index.numel():
        least = size.index_select(0, index).amin()
        if int(torch.count_nonzero(size >= least)) > screen:
            inside = top_k_mask(size, screen).index_select(0, index)
            index = index.index_select(0, positions(inside))
    return index


def _zero_unless(chosen: Tensor, size: Tensor) -> Tensor:
    """``size`` (>= 0) where chosen, in the same order but above 0; 0 elsewhere.

    The bits of a float >= 0 order like integers; the next one up sets a chosen 0 apart.
    """
    word = torch.int64 if size.dtype == torch.float64 else torch.int32
    return ((size.view(word) + 1) & -chosen.view(torch.int8)).view(size.dtype)


def selective_update_(
    theta: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    config: SelectionConfig,
    lr: float,
    weight_decay: float = 0.0,
) -> SelectionStats:
    """One whole update of ``theta`` in place, with the averages; all tensors are ``[p]``.

    The averages must be in the precision wanted for the rule (float32 or float64); ``theta`` may be lower.
    """
    grad = grad.to(m.dtype)
    n = grad.numel()
    stability = torch.empty_like(grad)
    size = chunk_on(grad.device, _CHUNK)  # several passes over values that stay in the cache
    for start in range(0, n, size):
        part = slice(start, start + size)
        update_averages_(m[part], v[part], grad[part], config.beta)
        stability[part] = consistency(m[part], v[part], config.delta)
    index = select(grad, stability, config)
    wide = theta.index_select(0, index).to(m.dtype)
    step = stability.index_select(0, index) * grad.index_select(0, index) + weight_decay * wide
    theta.scatter_(0, index, (wide - lr * step).to(theta.dtype))
    return SelectionStats(float(stability.mean()) if n else 0.0, index.numel(), n)
