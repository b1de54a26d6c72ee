"""w²·E[g²]."""

from torch import Tensor

from resu.pruning.importance.base import register_importance, wide
from resu.pruning.statistics import Stats


@register_importance("fisher", needs={"grads"})
def fisher(weight: Tensor, stats: Stats) -> Tensor:
    """``w²·E[g²]``, the diagonal Fisher approximation (Theis et al., arXiv 1801.05787, eq. 6), E over batches."""
    square = stats.grad_squared
    if square is None:  # one gradient is one sample
        assert stats.grad is not None
        square = wide(stats.grad).square()
    return wide(weight).square() * square
