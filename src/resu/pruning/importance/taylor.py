"""|w·g|."""

from torch import Tensor

from resu.pruning.importance.base import mean_gradient, register_importance, wide
from resu.pruning.statistics import Stats


@register_importance("taylor", needs={"grads"})
def taylor(weight: Tensor, stats: Stats) -> Tensor:
    """``|w·g|``, the first-order change of the loss when a weight becomes 0; g the mean gradient over batches.

    Paper: Molchanov et al., arXiv 1611.06440, eq. 7, for single weights as in arXiv 1906.10771 (squared there). Cost:
    a backward pass over the data, one float32 tensor of the weights' size. Fails: at a minimum of the loss, where g
    averages out and the second order (``fisher``) is what is left, and for many weights at once, which it takes as
    independent. Differs from the authors' code, which scores whole feature maps, averages ``|w·g|`` over batches, and
    normalises by layer; here the gradient is averaged first.
    """
    return (wide(weight) * wide(mean_gradient(stats, "taylor"))).abs_()
