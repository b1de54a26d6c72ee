"""θ updated by the layer itself: ``resu_step`` in RESU mode, the gradient hook in QRESU_SELECTIVE mode."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resu.core.resurrection import gather_theta, scatter_theta_
from resu.core.selective import selective_update_

if TYPE_CHECKING:
    from resu.modules.held import HeldWeight

__all__ = ["attach", "resu_step", "update_"]


def update_(layer: HeldWeight, theta: Tensor, grad: Tensor) -> dict[str, float]:
    """Update ``theta`` in place by the layer's settings; returns and keeps the statistics."""
    settings = layer.settings
    n = theta.numel()
    finite = bool(torch.isfinite(grad.sum())) or bool(torch.isfinite(grad).all())
    stats = {"mean_consistency": 0.0, "selection_ratio": 0.0, "n_selected": 0.0}
    if finite and settings.use_selective:
        assert layer.theta_m is not None
        assert layer.theta_v is not None
        done = selective_update_(
            theta, grad, layer.theta_m, layer.theta_v,
            settings.selective_config, settings.lr, settings.weight_decay,
        )  # fmt: skip
        stats = {
            "mean_consistency": done.mean_consistency,
            "selection_ratio": done.selection_ratio,
            "n_selected": float(done.n_selected),
        }
    elif finite:
        theta.sub_(grad.to(theta.dtype), alpha=settings.lr)
        stats = {"mean_consistency": 1.0, "selection_ratio": 1.0 if n else 0.0, "n_selected": float(n)}
    layer.last_update = {**stats, "n_pruned": float(n), "skipped": float(not finite)}
    return layer.last_update


@torch.no_grad()
def resu_step(layer: HeldWeight, grad_matrix: Tensor | None) -> dict[str, float]:
    """See ``RESUModule.resu_step``."""
    weight, mask = layer.weight, layer.mask
    assert mask is not None
    grad = weight.grad if grad_matrix is None else grad_matrix
    if grad is None:
        raise ValueError(
            "there is no gradient: call loss.backward() before resu_step(), or pass grad_matrix (it has been "
            "used up if resu_step() was called already)"
        )
    if grad.shape != weight.shape:
        raise ValueError(f"grad_matrix has shape {tuple(grad.shape)}, the weight has {tuple(weight.shape)}")
    theta = gather_theta(weight, mask)
    stats = update_(layer, theta, gather_theta(grad, mask))
    scatter_theta_(weight, theta, mask)
    if grad_matrix is None:
        weight.grad = None
    return stats


def attach(layer: HeldWeight) -> Any:
    """Have the layer update θ whenever a gradient has been accumulated; returns the hook's handle."""
    reference = weakref.ref(layer)

    def arrived(theta: Tensor) -> None:
        owner = reference()
        grad = theta.grad
        if owner is None or grad is None:
            return
        with torch.no_grad():
            grad = _agreed(grad)
            scale = owner.gradient_scale
            if isinstance(scale, Tensor) or scale != 1.0:
                grad = grad / scale
            theta.grad = None
            update_(owner, theta, grad)

    theta = layer.theta
    assert theta is not None
    return theta.register_post_accumulate_grad_hook(arrived)


def _agreed(grad: Tensor) -> Tensor:
    """The mean gradient over all ranks: every rank then makes the same update."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return grad
    world = distributed.get_world_size()
    if world == 1:
        return grad
    grad = grad.clone()
    distributed.all_reduce(grad)
    return grad.div_(world)
