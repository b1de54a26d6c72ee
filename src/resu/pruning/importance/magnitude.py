"""|w|."""

from __future__ import annotations

from torch import Tensor

from resu.pruning.importance.base import Stats, register_importance


@register_importance("magnitude")
def magnitude(weight: Tensor, stats: Stats) -> Tensor:
    """|w| (Han et al., arXiv 1506.02626)."""
    return weight.abs()
