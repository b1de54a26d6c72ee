"""A mask chosen once and kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resu.training.algorithms.base import Algorithm, View, algorithms

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
        if self.init not in ("random", "magnitude"):
            raise ValueError(f"init must be 'random' or 'magnitude', got {self.init!r}")

    def target(self, step: int) -> float:
        """0 before ``begin_step``, then the final sparsity."""
        return self.sparsity if step >= self.begin_step else 0.0

    def due(self, step: int) -> bool:
        """Once."""
        return step == self.begin_step

    def scores(self, view: View) -> Tensor:
        """|w|, or uniform random numbers."""
        if self.init == "magnitude":
            return view.weight.abs()
        # Drawn in float64 on the CPU: no ties, and the same mask on every device.
        draw = torch.rand(view.weight.shape, generator=view.generator, dtype=torch.float64)
        return draw.to(view.weight.device)
