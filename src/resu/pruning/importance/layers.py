"""Scores of one layer, and of all layers of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from resu.core.layers import select
from resu.pruning.importance.base import Importance, importances
from resu.pruning.statistics import Stats, collect

__all__ = [
    "compute_layer_importance",
    "gradient_importance",
    "magnitude_importance",
    "random_importance",
    "taylor_importance",
]


def _weight(layer: nn.Module | Tensor) -> Tensor:
    weight = layer if isinstance(layer, Tensor) else getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"expected a layer with a weight, or a weight, got {type(layer).__name__}")
    return weight


def magnitude_importance(layer: nn.Module | Tensor) -> Tensor:
    """``|w|`` of a layer (or of a weight), of the weight's shape.

    Example:
        >>> magnitude_importance(torch.tensor([[1.0, -2.0]]))
        tensor([[1., 2.]])
    """
    return importances["magnitude"](_weight(layer))


def gradient_importance(layer: nn.Module | Tensor) -> Tensor:
    """``|g|`` from the gradient that ``backward()`` left.

    Raises:
        ValueError: Without a gradient.
    """
    weight = _weight(layer)
    return importances["gradient"](weight, Stats(grad=weight.grad))


def taylor_importance(layer: nn.Module | Tensor) -> Tensor:
    """``|w·g|`` from the gradient that ``backward()`` left, float32 or wider.

    Raises:
        ValueError: Without a gradient.
    """
    weight = _weight(layer)
    return importances["taylor"](weight, Stats(grad=weight.grad))


def random_importance(layer: nn.Module | Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Uniform random scores, float64, from ``generator`` (None: the global one)."""
    return importances["random"](_weight(layer), Stats(generator=generator))


def compute_layer_importance(
    model: nn.Module,
    method: str = "magnitude",
    dataloader: Iterable[Any] | None = None,
    *,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Scores of every prunable weight.

    Args:
        model: Any module.
        method: Name of a registered importance.
        dataloader: Batches for the statistics the score needs; see :func:`resu.pruning.statistics.collect`.
            Without it, gradients are those that ``backward()`` left.
        loss_fn: ``loss_fn(model, batch) -> loss``, for gradients over ``dataloader``.
        include: Globs, as in :func:`resu.core.layers.select`.
        exclude: Globs.
        seed: Of random scores; each layer draws from (seed, name).

    Returns:
        ``{parameter name: scores}``, each of the parameter's own shape.

    Raises:
        ValueError: On an unknown method (the known ones are listed) or missing statistics.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> {name: tuple(s.shape) for name, s in compute_layer_importance(model, "magnitude").items()}
        {'0.weight': (8, 4), '1.weight': (2, 8)}
    """
    importance: Importance = importances[method]
    layers = select(model, include, exclude)
    stats: dict[str, Stats] = {}
    if importance.needs and dataloader is not None:
        if "grads" in importance.needs and loss_fn is None:
            raise ValueError(f"importance {method!r} needs gradients: pass loss_fn(model, batch) -> loss")
        stats = collect(model, layers, dataloader, importance.needs, loss_fn=loss_fn)
    scores = {}
    for name, layer in layers.items():
        grad = layer.weight.grad
        weight, grad = layer.matrix(layer.weight), None if grad is None else layer.matrix(grad)
        seen = stats.get(name) or Stats(grad=grad, generator=_generator(seed, name))
        try:
            score = importance(weight, seen)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from None
        scores[name] = layer.unmatrix(score)
    return scores


def _generator(seed: int, name: str) -> torch.Generator:
    # Not Python's hash(): it differs from process to process.
    digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
