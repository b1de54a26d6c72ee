"""What a driver reports of its layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from resu.training.flops import uses_per_pass

if TYPE_CHECKING:
    from resu.training.held_layer import HeldLayer

__all__ = ["LayerReport", "SparsityReport", "make_report"]


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        name: Parameter name.
        shape: Of the weight.
        keep: Active positions.
        sparsity: Fraction removed.
        explored: R_s, the share of positions that were ever active.
        grown: Positions grown by the last topology update.
        churn: Positions grown since the start (one counts each time it is grown), over the active ones.
        forward_share: Mean over the steps done of the share of weights that the forward pass multiplies.
        update_share: Mean over the steps done of the share of weights whose gradient is taken.
        uses: How often each weight is multiplied in a pass over the example inputs; None without any.
    """

    name: str
    shape: tuple[int, ...]
    keep: int
    sparsity: float
    explored: float
    grown: int = 0
    churn: float = 0.0
    forward_share: float = 1.0
    update_share: float = 1.0
    uses: float | None = None

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class SparsityReport:
    """All layers at a step; ``str()`` is a table, ``as_dict()`` is for machines.

    FLOPs are those of the selected layers on hardware that skips zeros, as shares of dense training and inference: a
    step costs one multiplication per active weight forward, one backward for the inputs, and one for each weight whose
    gradient is taken (Evci et al., arXiv 1911.11134, appendix H). What a method needs a dense gradient for counts.
    """

    step: int
    layers: tuple[LayerReport, ...]

    def _mean(self, value: Callable[[LayerReport], float], weight: Callable[[LayerReport], float]) -> float:
        total = sum(weight(layer) for layer in self.layers)
        return sum(value(layer) * weight(layer) for layer in self.layers) / total

    @property
    def sparsity(self) -> float:
        """Fraction removed over all layers."""
        total = sum(layer.numel for layer in self.layers)
        return 1 - sum(layer.keep for layer in self.layers) / total

    @property
    def explored(self) -> float:
        """R_s over all layers (ITOP, arXiv 2102.02887)."""
        return self._mean(lambda layer: layer.explored, lambda layer: layer.numel)

    @property
    def grown(self) -> int:
        """Positions grown by the last topology update."""
        return sum(layer.grown for layer in self.layers)

    @property
    def inference_flops(self) -> float | None:
        """Multiplications of a forward pass with the present masks, over those of the dense layers."""
        if any(layer.uses is None for layer in self.layers):
            return None
        return self._mean(lambda layer: 1 - layer.sparsity, lambda layer: layer.numel * (layer.uses or 0))

    @property
    def training_flops(self) -> float | None:
        """Multiplications of the training so far, over those of as many dense steps; None before the first step."""
        if self.step == 0 or any(layer.uses is None for layer in self.layers):
            return None
        return self._mean(
            lambda layer: (2 * layer.forward_share + layer.update_share) / 3,
            lambda layer: layer.numel * (layer.uses or 0),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "step": self.step,
            "sparsity": self.sparsity,
            "explored": self.explored,
            "grown": self.grown,
            "training_flops": self.training_flops,
            "inference_flops": self.inference_flops,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [5])
        head = f"{'layer':<{width}}  {'shape':>16}  {'kept':>10}  {'sparsity':>8}  {'explored':>8}  {'grown':>8}"
        lines = [head]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            lines.append(
                f"{layer.name:<{width}}  {shape:>16}  {layer.keep:>10}  {layer.sparsity:>8.4f}  {layer.explored:>8.4f}"
                f"  {layer.grown:>8}"
            )
        kept = sum(layer.keep for layer in self.layers)
        lines.append(
            f"{'total':<{width}}  {'':>16}  {kept:>10}  {self.sparsity:>8.4f}  {self.explored:>8.4f}  {self.grown:>8}"
        )
        if self.inference_flops is not None:
            lines.append(f"inference FLOPs: {self.inference_flops:.4f} of dense")
        if self.training_flops is not None:
            lines.append(f"training FLOPs so far: {self.training_flops:.4f} of dense")
        return "\n".join(lines)


def make_report(model: nn.Module, held: Mapping[str, HeldLayer], step: int, example_inputs: Any) -> SparsityReport:
    """See ``Sparsifier.report``."""
    layers = {name: one.layer for name, one in held.items()}
    uses = {} if example_inputs is None else uses_per_pass(model, layers, example_inputs)
    return SparsityReport(
        step=step,
        layers=tuple(
            LayerReport(
                name=name,
                shape=tuple(one.layer.weight.shape),
                keep=one.keep,
                sparsity=(one.numel - one.keep) / one.numel,
                explored=one.explored / one.numel,
                grown=one.grown,
                churn=one.grown_total / one.keep,
                forward_share=one.forward_work / (one.numel * step) if step else 1.0,
                update_share=one.update_work / (one.numel * step) if step else 1.0,
                uses=uses.get(name),
            )
            for name, one in held.items()
        ),
    )
