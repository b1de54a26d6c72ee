"""|g|."""

from torch import Tensor

from resu.pruning.importance.base import register_importance
from resu.pruning.statistics import Stats


@register_importance("gradient", needs={"grads"})
def gradient(weight: Tensor, stats: Stats) -> Tensor:
    """``|g|``, g the mean gradient."""
    if stats.grad is None:
        raise ValueError("importance 'gradient' needs the mean gradient")
    return stats.grad.abs()
