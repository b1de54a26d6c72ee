"""Uniform random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from resu.pruning.importance.base import Stats, register_importance


@register_importance("random")
def random(weight: Tensor, stats: Stats) -> Tensor:
    """Uniform in [0, 1), float64 and drawn on the generator's device: the same on every device."""
    where = stats.generator.device if stats.generator is not None else "cpu"
    draw = torch.rand(weight.shape, generator=stats.generator, dtype=torch.float64, device=where)
    return draw.to(weight.device)
