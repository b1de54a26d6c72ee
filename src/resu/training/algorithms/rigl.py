"""RigL: drop by magnitude, grow by gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

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
    standing_scores,
    without_exchange,
)

__all__ = ["RigL"]


@algorithms.register("rigl")
@dataclass(frozen=True, kw_only=True)
class RigL(Algorithm):
    """The rigged lottery (RigL; Evci et al., arXiv 1911.11134, algorithm 1).

    Sparse from the first step. Every ``interval`` steps ``k = floor(f(t)·n)`` of the n active weights of a layer, those
    of smallest |w|, are dropped, and the k positions of largest ``|∂L/∂(M⊙W)|`` among all that are not kept are
    grown at 0. ``f(t) = α/2·(1 + cos(π t / T_end))`` (eq. 1). The gradient is that of the effective weight at every
    position, summed in fp32 over the micro-batches of the step.

    Cost: that of masked training on dense hardware; the gradient is kept in fp32 (4 bytes per weight) for one step per
    interval. Fails: grown weights start at 0 with a large gradient and may fall out again before they have grown: with
    short intervals nothing new survives. Differs from the authors' code: the step before an update is done and
    not skipped, so weights are dropped after it; no noise is added to |w|; state of dropped weights is zeroed too, not
    of grown ones alone. The paper's uniform distribution leaves the first layer dense: exclude it by name.

    Args:
        alpha: Fraction of active weights dropped at the first update.
        init: First mask: ``"random"``, or ``"magnitude"`` for a trained network.

    Example:
        >>> rule = RigL(sparsity=0.9, interval=100, end_step=750)
        >>> rule.due(0), rule.due(100), rule.due(750), rule.target(0)
        (True, True, False, 0.9)
    """

    alpha: float = 0.3
    init: str = "random"

    gradient: ClassVar[Literal["none", "active", "dense"]] = "dense"

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
        """Drop by magnitude, grow by gradient."""
        if view.step == 0:
            return view.pattern.select(initial_scores(view, self.init), view.keep)
        if view.gradient is None:
            return without_exchange(view)
        survive = kept_through(drop_fraction(self.alpha, step, self.end_step), view.keep)
        return drop_and_grow(view, view.weight.abs(), view.gradient.abs(), survive)
