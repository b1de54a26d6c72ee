"""MEST: drop by magnitude and gradient, grow at random; elastic or with a soft memory bound."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from resu.core.pattern import NM, Pattern
from resu.training.algorithms.base import Algorithm, View, algorithms
from resu.training.algorithms.drop_grow import (
    check_fraction,
    check_init,
    drop_and_grow,
    initial_scores,
    kept_through,
    moves_at,
    random_scores,
    standing_scores,
    without_exchange,
)

__all__ = ["MEST"]


@algorithms.register("mest")
@dataclass(frozen=True, kw_only=True)
class MEST(Algorithm):
    """Memory-economic sparse training (MEST; Yuan et al., arXiv 2110.14032, §3): EM, and EM&S with ``soft=True``.

    Sparse from the first step. Importance of an active weight is ``|w| + λ|g|``, with g the gradient that the optimizer
    was given for the step (after unscaling and clipping). *EM*: every ``interval`` steps a layer of n kept weights
    drops its ``floor(p·n)`` least important ones and grows as many at random. *EM&S*: it grows first, so that it holds
    ``n + floor(p·n)`` weights until the next update, which drops the least important of all of them: new weights get
    ``interval`` steps to prove themselves. p falls in equally long stages, the last of them 0.

    Cost: that of masked training, no dense gradient; EM&S holds ``floor(p·n)`` more weights. Fails: as SET, grows
    blindly. Differs from the authors' code: there λ|g| has no effect, for gradients were cleared before it was read;
    counts are exact; p is a fraction of the kept weights, the paper's is of all weights (``p·(1 - sparsity)``).

    Args:
        mutation: p of each stage between ``begin_step`` and ``end_step``; without an end the first holds for ever.
        grad_weight: λ.
        soft: EM&S, which needs an ``end_step`` to come down to the final sparsity at.
        init: First mask: ``"random"``, or ``"magnitude"`` for a trained network.

    Example:
        >>> rule = MEST(sparsity=0.9, interval=100, end_step=800)
        >>> [rule.fraction(step) for step in (0, 199, 200, 500, 700, 900)]
        [0.3, 0.3, 0.2, 0.1, 0.0, 0.0]
    """

    mutation: tuple[float, ...] = (0.3, 0.2, 0.1, 0.0)
    grad_weight: float = 0.01
    soft: bool = False
    init: str = "random"

    gradient: ClassVar[Literal["none", "active", "dense"]] = "active"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_init(self.init)
        object.__setattr__(self, "mutation", tuple(self.mutation))  # a list, where it comes from a file
        if not self.mutation:
            raise ValueError("mutation needs at least one stage, for example (0.3, 0.2, 0.1, 0.0)")
        for fraction in self.mutation:
            check_fraction(fraction, "mutation")
        if not (self.grad_weight >= 0 and math.isfinite(self.grad_weight)):
            raise ValueError(f"grad_weight must be finite and not negative, got {self.grad_weight!r}")
        if self.soft and (self.end_step is None or self.mutation[-1] != 0):
            raise ValueError(
                "with soft=True a layer holds more weights than its budget between updates: give end_step, and a last "
                f"stage of 0 (mutation={self.mutation!r}, end_step={self.end_step!r})"
            )

    def fraction(self, step: int) -> float:
        """Fraction p of the stage that ``step`` lies in."""
        if self.end_step is None:
            return self.mutation[0]
        stages, length = len(self.mutation), self.end_step - self.begin_step
        if step >= self.end_step or length == 0:
            return self.mutation[-1]
        return self.mutation[max(0, step - self.begin_step) * stages // length]

    def due(self, step: int) -> bool:
        """At the start, then every interval, the end included."""
        return moves_at(self, step) or step == self.end_step

    def refuses(self, pattern: Pattern) -> str | None:
        """EM&S holds more weights than N of M for a time."""
        if self.soft and isinstance(pattern, NM):
            return f"EM&S grows before it drops, and a group of {pattern.n}:{pattern.m} has no room for more"
        return None

    def scores(self, view: View) -> Tensor:
        """|w| of active weights."""
        return standing_scores(view, self.init)

    def update_mask(self, view: View, sparsity: float, step: int) -> Tensor:
        """EM: drop, then grow. EM&S: drop to the budget, then grow beyond it."""
        if view.step == 0:
            kept = view.pattern.select(initial_scores(view, self.init), view.keep)
            rank = view.weight.abs()
        else:
            if view.gradient is None:
                return without_exchange(view)
            rank = view.weight.abs() + self.grad_weight * view.gradient.abs()
            if not self.soft:
                return drop_and_grow(view, rank, random_scores(view), kept_through(self.fraction(step), view.keep))
            kept = drop_and_grow(view, rank, rank, view.keep)  # all that survive fill the budget
        if not self.soft:
            return kept
        room = min(kept.numel(), 2 * view.keep - kept_through(self.fraction(step), view.keep))
        larger = dataclasses.replace(view, mask=kept, keep=room)
        return drop_and_grow(larger, rank, random_scores(view), view.keep)
