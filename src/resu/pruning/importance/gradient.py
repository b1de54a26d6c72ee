"""|g|."""

from torch import Tensor

from resu.pruning.importance.base import mean_gradient, register_importance
from resu.pruning.statistics import Stats


@register_importance("gradient", needs={"grads"})
def gradient(weight: Tensor, stats: Stats) -> Tensor:
    """``|g|``, g the mean gradient over batches: weights that the loss does not ask to change go.

    Paper: the growth criterion of RigL (Evci et al., arXiv 1911.11134, §3) read as a score of kept weights. Cost: a
    backward pass over the data, one float32 tensor of the weights' size. Fails: near a minimum, where all mean
    gradients are noise, and it ignores how large a weight is, so that removing it may cost much; ``taylor`` does not.
    A baseline for comparisons rather than a method to use.
    """
    return mean_gradient(stats, "gradient").abs()
