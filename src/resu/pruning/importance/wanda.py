"""|w|·‖x‖."""

from torch import Tensor

from resu.pruning.importance.base import register_importance, wide
from resu.pruning.statistics import Stats


@register_importance("wanda", needs={"inputs"}, scope="row")
def wanda(weight: Tensor, stats: Stats) -> Tensor:
    """``|W_ij|·‖x_j‖₂``, compared within each output row (Sun et al., arXiv 2306.11695, eq. 1)."""
    norm = stats.input_norm
    assert norm is not None
    if norm.ndim == 1 and weight.ndim > 2:  # per input channel of a convolution
        norm = norm.view(-1, *[1] * (weight.ndim - 2))
    if norm.ndim > weight.ndim or any(
        n not in (1, w) for n, w in zip(reversed(norm.shape), reversed(weight.shape), strict=False)
    ):
        raise ValueError(f"input norms of shape {tuple(norm.shape)} do not fit a weight of shape {tuple(weight.shape)}")
    return wide(weight).abs() * norm.to(weight.device)
