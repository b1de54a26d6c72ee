"""Sparse evolutionary training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from resu.training.algorithms.base import Algorithm, View, algorithms
from resu.training.algorithms.drop_grow import (
    check_fraction,
    check_init,
    drop_and_grow,
    drop_fraction,
    initial_scores,
    kept_through,
    moves_at,
    random_scores,
    standing_scores,
)

__all__ = ["SET"]


@algorithms.register("set")
@dataclass(frozen=True, kw_only=True)
class SET(Algorithm):
    """Sparse evolutionary training (SET; Mocanu et al., arXiv 1707.04780): drop the smallest, grow at random.

    Sparse from the first step. Every ``interval`` steps ``floor(f·n)`` of the n active weights of a layer, those of
    smallest |w|, are dropped, and as many positions, drawn without replacement among all that are not kept, are grown
    at 0. f falls along a cosine from ``alpha`` to 0 at ``end_step``.

    Cost: that of masked training; an update is two selections. Needs no dense gradient, so weights at pruned positions
    cost nothing. Fails: explores slowly at high sparsity, where a random position is seldom a good one. Differs from
    the authors' code: weights of either sign are dropped by |w| (theirs takes the smallest positive and the largest
    negative ones), f falls (theirs is a constant 0.3), and dropped positions may be drawn again.

    Args:
        alpha: Fraction of active weights dropped at the first update.
        init: First mask: ``"random"``, or ``"magnitude"`` for a trained network.

    Example:
        >>> rule = SET(sparsity=0.9, interval=100, end_step=750)
        >>> [step for step in range(0, 1000, 50) if rule.due(step)]
        [0, 100, 200, 300, 400, 500, 600, 700]
    """

    alpha: float = 0.3
    init: str = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self.alpha, "alpha")
        check_init(self.init)

    def due(self, step: int) -> bool:
        """At the start, then every interval before the end."""
        return moves_at(self, step)

    def scores(self, view: View) -> Tensor:
        """|w| of active weights."""
        return standing_scores(view, self.init)

    def update_mask(self, view: View, sparsity: float, step: int) -> Tensor:
        """Drop by magnitude, grow at random."""
        if view.step == 0:
            return view.pattern.select(initial_scores(view, self.init), view.keep)
        survive = kept_through(drop_fraction(self.alpha, step, self.end_step), view.keep)
        return drop_and_grow(view, view.weight.abs(), random_scores(view), survive)
