"""(|w|/Σ_row + |w|/Σ_column)·‖x‖^½."""

from torch import Tensor

from resu.pruning.importance.base import input_norms, register_importance, wide
from resu.pruning.statistics import Stats


@register_importance("ria", needs={"inputs"})
def ria(weight: Tensor, stats: Stats) -> Tensor:
    """``(|W_ij|/Σ_j|W_ij| + |W_ij|/Σ_i|W_ij|)·‖x_j‖₂^½``: a weight counts by its share of its output and of its input.

    Paper: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR
    2024, relative importance and activation with a = ½. Rows are outputs, a column is one input, or one input channel
    at one kernel position. Cost: as ``wanda``, and two sums over the weight. Fails: on layers of a few columns, where
    the sums say little; and the relative part undoes the differences of scale between layers, so that
    ``distribution="global"`` ranks layers by their sizes. Weights compete within the layer, as in the authors' code
    by default, which ``method="row"`` changes. Differs from the authors' code: a row or column of zeros scores 0, not
    NaN, ties keep exactly the count, and their permutation of channels for N:M is not part of the score.
    """
    size = wide(weight).abs()
    # One row at a time would be a loop; the sums are tiny, so the two products are what is allocated.
    rows = size.sum(dim=tuple(range(1, size.ndim)), keepdim=True)
    groups = size.unflatten(0, (stats.parts, -1))  # the columns of a grouped convolution are other inputs in each group
    columns = groups.sum(dim=1, keepdim=True)
    share = size / rows.masked_fill_(rows == 0, 1)
    share.view(groups.shape).addcdiv_(groups, columns.masked_fill_(columns == 0, 1))
    return share.mul_(input_norms(weight, stats).sqrt())
