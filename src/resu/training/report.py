"""What a driver reports of its layers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["LayerReport", "SparsityReport"]


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        name: Parameter name.
        shape: Of the weight.
        keep: Active positions.
        sparsity: Fraction removed.
        explored: R_s, the share of positions that were ever active.
    """

    name: str
    shape: tuple[int, ...]
    keep: int
    sparsity: float
    explored: float


@dataclass(frozen=True)
class SparsityReport:
    """All layers at a step; ``str()`` is a table, ``as_dict()`` is for machines."""

    step: int
    layers: tuple[LayerReport, ...]

    @property
    def sparsity(self) -> float:
        """Fraction removed over all layers."""
        total = sum(math.prod(layer.shape) for layer in self.layers)
        return 1 - sum(layer.keep for layer in self.layers) / total

    @property
    def explored(self) -> float:
        """R_s over all layers (ITOP, arXiv 2102.02887)."""
        total = sum(math.prod(layer.shape) for layer in self.layers)
        return sum(layer.explored * math.prod(layer.shape) for layer in self.layers) / total

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "step": self.step,
            "sparsity": self.sparsity,
            "explored": self.explored,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [5])
        lines = [f"{'layer':<{width}}  {'shape':>16}  {'kept':>10}  {'sparsity':>8}  {'explored':>8}"]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            lines.append(
                f"{layer.name:<{width}}  {shape:>16}  {layer.keep:>10}  {layer.sparsity:>8.4f}  {layer.explored:>8.4f}"
            )
        kept = sum(layer.keep for layer in self.layers)
        lines.append(f"{'total':<{width}}  {'':>16}  {kept:>10}  {self.sparsity:>8.4f}  {self.explored:>8.4f}")
        return "\n".join(lines)
