"""w²/[H⁻¹]_jj."""

from torch import Tensor

from resu.pruning.hessian import saliency
from resu.pruning.importance.base import register_importance
from resu.pruning.statistics import Stats


@register_importance("sparsegpt", needs={"hessian"})
def sparsegpt(weight: Tensor, stats: Stats) -> Tensor:
    """``w² / [H⁻¹]_jj`` with 1 % damping (Frantar & Alistarh, arXiv 2301.00774, eq. 3): optimal brain surgeon.

    It ranks the weights of a layer or, H being a mean over tokens, of several; the solver that also updates the weights
    that stay, and ranks anew as it goes, is :func:`resu.pruning.sparsegpt.sparsegpt`.
    """
    assert stats.hessian is not None
    return saliency(weight, stats.hessian)
