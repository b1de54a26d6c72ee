"""w²·E[g²]."""

from torch import Tensor

from resu.pruning.importance.base import register_importance, wide
from resu.pruning.statistics import Stats


@register_importance("fisher", needs={"grads"})
def fisher(weight: Tensor, stats: Stats) -> Tensor:
    """``w²·E[g²]``: the second-order change of the loss with the Fisher information in place of the Hessian.

    Paper: Theis et al., arXiv 1801.05787, eq. 6 (the factor ½ changes no ranking). Cost: a backward pass over the
    data, two float32 tensors of the weights' size. Fails: where the model is far from a minimum of the loss (the
    first order dominates: ``taylor``), and with large batches: E is the mean over batches of the squared batch
    gradient, which is the paper's expectation over examples only for batches of one. It takes weights as independent;
    ``sparsegpt`` does not. Differs from the authors' code, which sums over feature maps and adds a cost per layer.
    """
    square = stats.grad_squared
    if square is None:  # one gradient is one sample
        assert stats.grad is not None
        square = wide(stats.grad).square()
    return wide(weight).square().mul_(square)
