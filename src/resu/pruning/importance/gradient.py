"""|∂L/∂w| and |w · ∂L/∂w|."""

from __future__ import annotations

from torch import Tensor

from resu.pruning.importance.base import Stats, register_importance


@register_importance("gradient", needs=("grads",))
def gradient(weight: Tensor, stats: Stats) -> Tensor:
    """|∂L/∂w|."""
    assert stats.grad is not None
    return stats.grad.abs()


@register_importance("taylor", needs=("grads",))
def taylor(weight: Tensor, stats: Stats) -> Tensor:
    """|w · ∂L/∂w|, first-order change of the loss (Molchanov et al., arXiv 1611.06440, eq. 7, per weight)."""
    assert stats.grad is not None
    return (weight * stats.grad).abs()
