"""GraNet: gradual pruning with a drop-and-grow at each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from resu.core.counting import check_sparsity
from resu.training.algorithms.base import Algorithm, View, algorithms, ramp
from resu.training.algorithms.drop_grow import (
    check_fraction,
    check_init,
    drop_and_grow,
    drop_fraction,
    initial_scores,
    kept_through,
    standing_scores,
    without_exchange,
)

__all__ = ["GraNet"]


@algorithms.register("granet")
@dataclass(frozen=True, kw_only=True)
class GraNet(Algorithm):
    """Gradual pruning with zero-cost neuroregeneration (GraNet; Liu et al., arXiv 2106.10404, algorithm 1).

    The sparsity follows the cubic ramp of gradual pruning to exactly the final one at ``end_step``. At each update the
    layer is pruned to it by |w|, then a fraction ``f(t)`` of what is left (falling along a cosine, as in RigL) is
    dropped by |w| and as many positions are grown by ``|∂L/∂(M⊙W)|``.

    Cost: as gradual pruning, and a dense gradient in fp32 for one step per interval. Fails: from a dense start it saves
    training cost only late. Differs from the authors' code: exact counts; the step before an update is not skipped.

    Args:
        initial_sparsity: Where the ramp starts: 0 is the paper's dense-to-sparse, 0.5 its sparse-to-sparse.
        alpha: Fraction of active weights exchanged at the first update.
        init: First mask where ``initial_sparsity`` is above 0: ``"random"`` or ``"magnitude"``.

    Raises:
        ValueError: Without ``end_step``.

    Example:
        >>> rule = GraNet(sparsity=0.9, end_step=1000)
        >>> rule.target(0), rule.target(500), rule.target(1000), rule.due(1000)
        (0.0, 0.7875, 0.9, True)
    """

    initial_sparsity: float = 0.0
    alpha: float = 0.5
    init: str = "random"

    gradient: ClassVar[Literal["none", "active", "dense"]] = "dense"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparsity(self.initial_sparsity, "initial_sparsity")
        check_fraction(self.alpha, "alpha")
        check_init(self.init)
        if self.initial_sparsity > self.sparsity:
            raise ValueError(f"initial_sparsity {self.initial_sparsity} is above the final sparsity {self.sparsity}")
        if self.end_step is None:
            raise ValueError("GraNet prunes along a ramp: give end_step, where it reaches the final sparsity")

    def target(self, step: int) -> float:
        """The ramp's value."""
        return ramp(self.initial_sparsity, self.sparsity, self.begin_step, self.end_step)(step)

    def due(self, step: int) -> bool:
        """At the start (the first mask), then every interval of the ramp, its end included."""
        return step == 0 or super().due(step)

    def scores(self, view: View) -> Tensor:
        """|w| of active weights."""
        return standing_scores(view, self.init)

    def update_mask(self, view: View, sparsity: float, step: int) -> Tensor:
        """Prune to the ramp, then exchange."""
        if view.step == 0:
            return view.pattern.select(initial_scores(view, self.init), view.keep)
        if view.gradient is None:
            return without_exchange(view)
        survive = kept_through(drop_fraction(self.alpha, step, self.end_step), view.keep)
        return drop_and_grow(view, view.weight.abs(), view.gradient.abs(), survive)
