"""|w| · ‖x‖."""

from __future__ import annotations

import torch
from torch import Tensor

from resu.pruning.importance.base import Stats, register_importance


@register_importance("wanda", needs=("inputs",))
def wanda(weight: Tensor, stats: Stats) -> Tensor:
    """|W_ij| · ‖x_j‖₂ in fp32 (Sun et al., arXiv 2306.11695, eq. 1); compare within each output row."""
    assert stats.input_norm is not None
    norm = stats.input_norm.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    if norm.ndim == 1 and weight.ndim == 4:  # one norm per channel, for every kernel position
        norm = norm[:, None, None]
    if norm.shape != weight.shape[1 : 1 + norm.ndim] and norm.shape != weight.shape[1:]:
        raise ValueError(f"input norms of shape {tuple(norm.shape)} do not fit a weight of shape {tuple(weight.shape)}")
    return weight.abs().to(norm.dtype) * norm
