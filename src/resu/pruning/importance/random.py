"""Uniform random numbers."""

import torch
from torch import Tensor

from resu.pruning.importance.base import register_importance
from resu.pruning.statistics import Stats


@register_importance("random")
def random(weight: Tensor, stats: Stats) -> Tensor:
    """Uniform numbers from ``stats.generator``: what any other score has to beat.

    Cost: one float64 tensor of the weights' shape, which makes equal scores all but impossible and the
    draw the same on every device. Counts are exact; nothing is drawn weight by weight with a probability.
    """
    # Drawn where the generator lives.
    where = stats.generator.device if stats.generator is not None else "cpu"
    draw = torch.rand(weight.shape, generator=stats.generator, dtype=torch.float64, device=where)
    return draw.to(weight.device)
