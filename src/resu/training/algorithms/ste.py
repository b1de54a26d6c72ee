"""Straight-through training: a masked forward, a dense update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from resu.training.algorithms.base import Algorithm, View, algorithms

__all__ = ["STE"]


@algorithms.register("ste")
@dataclass(frozen=True, kw_only=True)
class STE(Algorithm):
    """Straight-through training (STE), and SR-STE for N:M with ``decay=2e-4`` (Zhou et al., arXiv 2102.04010, eq. 9).

    The forward sees M⊙W, with M the largest |W| under the pattern at every step; the gradient of the masked forward
    passes straight through to all of W. SR-STE adds ``λ(1 - M)⊙W`` to it, which pulls pruned weights to 0, so that they
    do not come back by chance and the mask settles.

    Cost: that of dense training, and an exact selection per ``interval``; pruned values are kept (4 bytes per weight).
    Fails: without decay the mask may go on changing to the end; give ``end_step`` to freeze it. Differs from the
    authors' code: weight decay of the optimizer acts on active weights alone, and the last mask is exact in every
    layer.

    Args:
        decay: λ of SR-STE; 0: plain STE.

    Example:
        >>> STE(sparsity=0.5, decay=2e-4).interval
        1
    """

    interval: int = 1
    decay: float = 0.0

    learns_pruned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.decay >= 0 and math.isfinite(self.decay)):
            raise ValueError(f"decay must be finite and not negative, got {self.decay!r}")

    @property
    def clears_state(self) -> bool:
        """Momenta go on: a weight trains on both sides of the mask."""
        return False

    def target(self, step: int) -> float:
        """0 before it begins."""
        return self.sparsity if step >= self.begin_step else 0.0

    def learning(self, step: int) -> bool:
        """Until the mask is frozen."""
        return step >= self.begin_step and (self.end_step is None or step < self.end_step)

    def scores(self, view: View) -> Tensor:
        """|W|, pruned or not."""
        value = view.weight if view.theta is None else view.weight + view.theta
        return value.abs()

    def penalty(self, weight: Tensor, theta: Tensor) -> Tensor | None:
        """λ(1 - M)⊙W."""
        return self.decay * theta if self.decay else None
