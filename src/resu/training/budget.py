"""The driver's budget: exact counts per layer on the way to a distribution over layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from resu.pruning.allocation import Allocation, allocate, allocations

__all__ = ["check_distribution", "keeps_at"]

Distribution = str | Mapping[str, float] | Allocation


def check_distribution(distribution: Distribution, shapes: Mapping[str, torch.Size], sparsity: float) -> None:
    """Raise ``ValueError`` now, not at the first update, on an unknown name or a glob that matches nothing."""
    if isinstance(distribution, str):
        allocations[distribution]
    elif isinstance(distribution, Mapping):
        allocate(distribution, shapes, sparsity)


def keeps_at(
    distribution: Distribution,
    shapes: Mapping[str, torch.Size],
    sparsity: float,
    final: float,
    scores: Mapping[str, Tensor] | None = None,
) -> dict[str, int]:
    """How many weights each layer keeps at ``sparsity`` of a run that ends at ``final``.

    With a mapping ``{glob: final sparsity}`` every layer is at the same fraction of its own final sparsity.
    """
    if sparsity == 0:
        return {name: shape.numel() for name, shape in shapes.items()}
    if isinstance(distribution, Mapping) and sparsity != final:
        distribution = {glob: round(s * sparsity / final, 12) for glob, s in distribution.items()}
    return allocate(distribution, shapes, sparsity, scores)
