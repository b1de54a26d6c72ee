"""|w·g| at initialisation."""

from torch import Tensor

from resu.pruning.importance.base import mean_gradient, register_importance, wide
from resu.pruning.statistics import Stats


@register_importance("snip", needs={"grads"})
def snip(weight: Tensor, stats: Stats) -> Tensor:
    """``|w·g|`` of a network before training: how much the loss depends on the connection being there.

    Paper: Lee et al., arXiv 1810.02340, connection sensitivity (``∂L/∂c = w·∂L/∂w`` at c = 1). "At init" is up to the
    caller: pass the freshly initialised model (initialised so that variance is kept from layer to layer, as PyTorch
    does), one or a few batches, and train with the masks afterwards. On a trained model this is ``taylor``. Cost: one
    backward pass, one float32 tensor of the weights' size. Fails: beyond about 95 % it may empty layers (here one
    weight stays), and it is below pruning after training at equal final sparsity. Differs from the authors' code:
    their division by the sum of all scores is left out because it changes no ranking. Use ``distribution="global"``
    as they do.
    """
    return (wide(weight) * wide(mean_gradient(stats, "snip"))).abs_()
