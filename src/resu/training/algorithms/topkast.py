"""Top-KAST: a sparse forward, a less sparse backward."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from resu.core.counting import check_sparsity
from resu.core.pattern import NM, Pattern, Unstructured
from resu.training.algorithms.base import Algorithm, View, algorithms

__all__ = ["TopKAST"]


@algorithms.register("top-kast")
@dataclass(frozen=True, kw_only=True)
class TopKAST(Algorithm):
    """Top-KAST (Jayakumar et al., arXiv 2106.03517, §2).

    The forward uses the D·n weights of largest |θ| of a layer (set A); the optimizer also learns the next M·n (set B
    holds both) from the gradient of that sparse forward; what lies outside B keeps its value. Sets are chosen anew
    every ``interval`` steps. The exploration regularizer adds the gradient of ``λ·|θ|`` in A and of ``λ·|θ|/D`` in B
    outside A, so that weights that are not used must be wanted to stay.

    Cost: forward at density D, backward at D + M; on dense hardware that of masked training, and pruned values are kept
    (4 bytes per weight). Fails: with M near 0 nothing is explored. Differs from the authors' code: exact counts, and
    masks frozen from ``end_step`` on, if given.

    Args:
        backward_sparsity: 1 - (D + M). None: twice the density of the forward, ``max(0, 2·sparsity - 1)``.
        regularization: λ. The paper gives 1e-4 for a squared norm; as |θ| in Adam that is too much
            (docs/leaderboard.md).

    Example:
        >>> TopKAST(sparsity=0.9).backward_sparsity
        0.8
    """

    backward_sparsity: float | None = None
    regularization: float = 1e-5

    learns_pruned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backward_sparsity is None:
            object.__setattr__(self, "backward_sparsity", round(max(0.0, 2 * self.sparsity - 1), 12))
        assert self.backward_sparsity is not None
        check_sparsity(self.backward_sparsity, "backward_sparsity")
        if self.backward_sparsity > self.sparsity:
            raise ValueError(
                f"backward_sparsity {self.backward_sparsity} is above sparsity {self.sparsity}: the backward set holds "
                "the forward set"
            )
        if not (self.regularization >= 0 and math.isfinite(self.regularization)):
            raise ValueError(f"regularization must be finite and not negative, got {self.regularization!r}")

    @property
    def clears_state(self) -> bool:
        """Momenta go on between A and B; what leaves B loses them."""
        return False

    def target(self, step: int) -> float:
        """0 before it begins."""
        return self.sparsity if step >= self.begin_step else 0.0

    def learning(self, step: int) -> bool:
        """Until the mask is frozen."""
        return step >= self.begin_step and (self.end_step is None or step < self.end_step)

    def scores(self, view: View) -> Tensor:
        """|θ|, used or not."""
        value = view.weight if view.theta is None else view.weight + view.theta
        return value.abs()

    def reach(self, view: View) -> Tensor | None:
        """Set B: as many times the kept positions as the two densities say, the largest |θ|."""
        assert self.backward_sparsity is not None
        wider = (1 - self.backward_sparsity) / (1 - self.sparsity)
        count = min(view.mask.numel(), round(int(torch.count_nonzero(view.mask)) * wider))
        pattern: Pattern = Unstructured() if isinstance(view.pattern, NM) else view.pattern
        return pattern.select(self.scores(view), count) | view.mask

    def penalty(self, weight: Tensor, theta: Tensor) -> Tensor | None:
        """Gradient of λ|θ| in A and of λ|θ|/D in the rest of B (the driver drops what lies outside B)."""
        if self.regularization == 0:
            return None
        return theta.sign().div_(1 - self.sparsity).add_(weight.sign()).mul_(self.regularization)
