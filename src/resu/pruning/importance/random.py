"""Uniform random numbers."""

import torch
from torch import Tensor

from resu.pruning.importance.base import register_importance
from resu.pruning.statistics import Stats


@register_importance("random")
def random(weight: Tensor, stats: Stats) -> Tensor:
    """Uniform numbers from ``stats.generator``."""
    # Drawn in float64 where the generator lives: no ties, and the same scores on every device.
    where = stats.generator.device if stats.generator is not None else "cpu"
    draw = torch.rand(weight.shape, generator=stats.generator, dtype=torch.float64, device=where)
    return draw.to(weight.device)
