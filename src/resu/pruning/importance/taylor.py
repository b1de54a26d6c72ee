"""|w·g|."""

from torch import Tensor

from resu.pruning.importance.base import register_importance, wide
from resu.pruning.statistics import Stats


@register_importance("taylor", needs={"grads"})
def taylor(weight: Tensor, stats: Stats) -> Tensor:
    """``|w·g|``, the first-order change of the loss (Molchanov et al., arXiv 1611.06440, eq. 7); SNIP at init."""
    if stats.grad is None:
        raise ValueError("importance 'taylor' needs the mean gradient")
    return (wide(weight) * wide(stats.grad)).abs()
