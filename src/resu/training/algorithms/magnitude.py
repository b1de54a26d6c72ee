"""Gradual magnitude pruning."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from resu.core.counting import check_sparsity
from resu.training.algorithms.base import Algorithm, View, algorithms, ramp

__all__ = ["Magnitude"]


@algorithms.register("magnitude")
@dataclass(frozen=True, kw_only=True)
class Magnitude(Algorithm):
    """Gradual magnitude pruning with the cubic ramp (GMP; Zhu & Gupta, arXiv 1710.01878, eq. 1).

    ``s_t = s_f + (s_i - s_f) (1 - (t - t0)/(nΔt))^3`` from ``begin_step`` to ``end_step``, where it is exactly the
    final sparsity. A pruned weight stays pruned. Without ``end_step`` it prunes to the end at once.

    Args:
        initial_sparsity: Sparsity at ``begin_step``.

    Example:
        >>> rule = Magnitude(sparsity=0.9, begin_step=0, end_step=1000, interval=100)
        >>> rule.target(500), rule.target(1000), rule.due(1000), rule.due(1100)
        (0.7875, 0.9, True, False)
    """

    initial_sparsity: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparsity(self.initial_sparsity, "initial_sparsity")
        if self.initial_sparsity > self.sparsity:
            raise ValueError(
                f"initial_sparsity {self.initial_sparsity} is above the final sparsity {self.sparsity}; "
                "gradual pruning only removes"
            )

    def target(self, step: int) -> float:
        """The ramp's value; 0 before it begins."""
        if step < self.begin_step:
            return 0.0
        return ramp(self.initial_sparsity, self.sparsity, self.begin_step, self.end_step)(step)

    def due(self, step: int) -> bool:
        """Every interval of the ramp, or once without ``end_step``."""
        return step == self.begin_step if self.end_step is None else super().due(step)

    def scores(self, view: View) -> Tensor:
        """|w|; what is pruned ranks below every active weight, zeros among them."""
        return view.weight.abs().masked_fill(view.mask.logical_not(), -1.0)
