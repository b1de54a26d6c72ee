"""|w|."""

from torch import Tensor

from resu.pruning.importance.base import register_importance
from resu.pruning.statistics import Stats


@register_importance("magnitude")
def magnitude(weight: Tensor, stats: Stats) -> Tensor:
    """``|w|`` (Han et al., arXiv 1506.02626)."""
    return weight.abs()
