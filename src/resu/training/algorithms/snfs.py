"""Sparse networks from scratch: grow by momentum, and move budget to the layers that have much of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

import torch
from torch import Tensor

from resu.core.counting import largest_remainder
from resu.core.pattern import Pattern, Unstructured
from resu.training.algorithms.base import Algorithm, View, algorithms
from resu.training.algorithms.drop_grow import (
    check_fraction,
    check_init,
    drop_and_grow,
    drop_fraction,
    moved_count,
    moves_at,
    standing_scores,
)

__all__ = ["SNFS"]


@algorithms.register("snfs")
@dataclass(frozen=True, kw_only=True)
class SNFS(Algorithm):
    """Sparse networks from scratch, "sparse momentum" (SNFS; Dettmers & Zettlemoyer, arXiv 1907.04840, algorithm 1).

    Sparse from the first step. The driver keeps an exponential mean of the dense gradients, every step. At an update
    each layer drops ``floor(f·n)`` of its n active weights by |w|; what all layers dropped is given back to them in
    proportion to the mean |momentum| of their active weights, and grown where |momentum| is largest. Budgets so move
    between layers; the total stays exact.

    Cost: a dense gradient and a mean over them at every step (8 bytes per weight): training is not sparse. Fails: ranks
    layers by the scale of their gradients, which normalization layers distort. Differs from the authors' code: the
    momentum is the driver's own, whatever the optimizer (theirs reads SGD's buffer or Adam's m/√v); f falls
    along a cosine to 0 at ``end_step``; counts are exact.

    Args:
        alpha: Fraction of active weights dropped at the first update.
        beta: Of the exponential mean.
        redistribution: Whether budget moves between layers; False: every layer regrows what it dropped.
        init: First mask: ``"random"``, or ``"magnitude"`` for a trained network.

    Example:
        >>> SNFS(sparsity=0.9, end_step=1000).gradient_memory
        0.9
    """

    alpha: float = 0.3
    beta: float = 0.9
    redistribution: bool = True
    init: str = "random"

    gradient: ClassVar[Literal["none", "active", "dense"]] = "dense"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self.alpha, "alpha")
        check_init(self.init)
        if not 0.0 <= self.beta < 1.0:
            raise ValueError(f"beta must lie in [0, 1), got {self.beta!r}")

    @property
    def gradient_memory(self) -> float | None:
        """β."""
        return self.beta

    def due(self, step: int) -> bool:
        """At the start, then every interval before the end."""
        return moves_at(self, step)

    def refuses(self, pattern: Pattern) -> str | None:
        """Other patterns than single weights round each layer's count, or fix it."""
        if self.redistribution and not isinstance(pattern, Unstructured):
            return f"SNFS moves single weights between layers, which {pattern} does not allow; set redistribution=False"
        return None

    def scores(self, view: View) -> Tensor:
        """|w| of active weights."""
        return standing_scores(view, self.init)

    def _dropped(self, view: View) -> int:
        return moved_count(drop_fraction(self.alpha, view.step, self.end_step), int(torch.count_nonzero(view.mask)))

    def redistribute(self, views: Mapping[str, View]) -> dict[str, int]:
        """What is free after all layers dropped, divided by the mean |momentum| of each layer's active weights."""
        keeps = {name: view.keep for name, view in views.items()}
        views = {name: view for name, view in views.items() if _moves(view)}  # the others keep what they have
        if not self.redistribution or not views:
            return keeps
        total = sum(keeps[name] for name in views)
        stay = {name: int(torch.count_nonzero(view.mask)) - self._dropped(view) for name, view in views.items()}
        means = {name: _mean_at(view.momentum, view.mask) for name, view in views.items()}
        mean = sum(means.values())
        free = total - sum(stay.values())
        if free < 0 or mean == 0 or not math.isfinite(mean):
            return keeps
        quotas = {name: stay[name] + Fraction(means[name] / mean) * free for name in views}
        return keeps | largest_remainder(total, quotas, {name: view.mask.numel() for name, view in views.items()})

    def update_mask(self, view: View, sparsity: float, step: int) -> Tensor:
        """Drop by magnitude, grow by momentum; without a momentum, keep what there is."""
        if view.step == 0 or not _moves(view):
            return view.pattern.select(standing_scores(view, self.init), view.keep)
        assert view.momentum is not None
        survive = min(view.keep, int(torch.count_nonzero(view.mask)) - self._dropped(view))
        return drop_and_grow(view, view.weight.abs(), view.momentum.abs(), survive)


def _moves(view: View) -> bool:
    """Whether the layer ever had a gradient (a state among processes writes 0 where there is no momentum yet)."""
    return view.momentum is not None and bool(view.momentum.any())


def _mean_at(momentum: Tensor | None, mask: Tensor) -> float:
    assert momentum is not None
    count = int(torch.count_nonzero(mask))
    return float(momentum.abs().masked_fill(mask.logical_not(), 0).sum(dtype=torch.float64)) / count if count else 0.0
