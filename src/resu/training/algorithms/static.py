"""A mask chosen once and kept."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from resu.training.algorithms.base import Algorithm, View, algorithms
from resu.training.algorithms.drop_grow import check_init, initial_scores

__all__ = ["Static"]


@algorithms.register("static")
@dataclass(frozen=True, kw_only=True)
class Static(Algorithm):
    """Prune once, at ``begin_step`` (0: when the driver is made), and train what is left.

    Args:
        init: ``"random"`` (sparse training from scratch; Evci et al., arXiv 1911.11134, "Static") or
            ``"magnitude"`` (one-shot pruning of a trained network).

    Example:
        >>> Static(sparsity=0.9).due(0), Static(sparsity=0.9).due(100)
        (True, False)
    """

    init: str = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_init(self.init)

    def target(self, step: int) -> float:
        """0 before ``begin_step``, then the final sparsity."""
        return self.sparsity if step >= self.begin_step else 0.0

    def due(self, step: int) -> bool:
        """Once."""
        return step == self.begin_step

    def scores(self, view: View) -> Tensor:
        """|w|, or uniform random numbers."""
        return initial_scores(view, self.init)
