"""|w|."""

from torch import Tensor

from resu.pruning.importance.base import register_importance
from resu.pruning.statistics import Stats


@register_importance("magnitude")
def magnitude(weight: Tensor, stats: Stats) -> Tensor:
    """``|w|``: small weights go. No data needed, and hard to beat where the model is trained on afterwards.

    Paper: Han et al., arXiv 1506.02626, §3. Cost: one pass over the weights, one tensor of their size and dtype.
    Fails: after one shot without training, where a few inputs are far larger than the others (language models
    beyond about 6 B parameters; use ``wanda``), and across layers of different scale under ``distribution="global"``
    (use ``"lamp"`` or ``"erk"``). Differs from the paper in that counts are exact: the paper prunes below a
    threshold, a multiple of the layer's standard deviation.
    """
    return weight.abs()
