"""Scores of one layer, and of all layers of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from resu.core.layers import Layer, select
from resu.core.randomness import derived_generator
from resu.pruning.importance.base import Importance, importances
from resu.pruning.inputs import input_parts
from resu.pruning.statistics import Stats, collect

__all__ = [
    "compute_layer_importance",
    "gradient_importance",
    "magnitude_importance",
    "random_importance",
    "score_layer",
    "scores_of",
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
    """``|g|`` from the gradient that ``backward()`` left, of the weight's shape.

    Raises:
        ValueError: Without a gradient.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer(torch.tensor([3.0, -4.0])).backward()
        >>> gradient_importance(layer)
        tensor([[3., 4.]])
    """
    weight = _weight(layer)
    return importances["gradient"](weight, Stats(grad=weight.grad))


def taylor_importance(layer: nn.Module | Tensor) -> Tensor:
    """``|w·g|`` from the gradient that ``backward()`` left, of the weight's shape, float32 or wider.

    Raises:
        ValueError: Without a gradient.

    Example:
        >>> weight = torch.tensor([[0.5, -2.0]], requires_grad=True)
        >>> (weight * torch.tensor([3.0, 1.0])).sum().backward()
        >>> taylor_importance(weight)
        tensor([[1.5000, 2.0000]])
    """
    weight = _weight(layer)
    return importances["taylor"](weight, Stats(grad=weight.grad))


def random_importance(layer: nn.Module | Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Uniform random scores, float64, of the weight's shape, from ``generator`` (None: the global one).

    Example:
        >>> a, b = (random_importance(nn.Linear(4, 2), torch.Generator().manual_seed(1)) for _ in range(2))
        >>> a.shape, bool((a == b).all())
        (torch.Size([2, 4]), True)
    """
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
    scores = scores_of(model, layers, importance, dataloader, loss_fn=loss_fn, seed=seed)
    return {name: layers[name].unmatrix(score) for name, score in scores}


def scores_of(
    model: nn.Module,
    layers: Mapping[str, Layer],
    importance: Importance,
    dataloader: Iterable[Any] | None = None,
    *,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    seed: int = 0,
) -> Iterator[tuple[str, Tensor]]:
    """Scores layer by layer as patterns see them, :meth:`resu.core.layers.Layer.matrix` of the weight's shape.

    Statistics are collected at once, before the first pair; scores are made when they are asked for.
    """
    stats: dict[str, Stats] = {}
    if importance.needs and dataloader is not None:
        if "grads" in importance.needs and loss_fn is None:
            raise ValueError(f"importance {importance.name!r} needs gradients: pass loss_fn(model, batch) -> loss")
        stats = collect(model, layers, dataloader, importance.needs, loss_fn=loss_fn)

    def each() -> Iterator[tuple[str, Tensor]]:
        for name, layer in layers.items():
            seen = stats.get(name)
            if seen is None:
                grad = layer.weight.grad if "grads" in importance.needs else None
                seen = Stats(grad=None if grad is None else layer.matrix(grad))
            seen = dataclasses.replace(seen, generator=derived_generator(seed, name))
            yield name, score_layer(importance, layer, seen)

    return each()


def score_layer(importance: Importance, layer: Layer, stats: Stats | None = None) -> Tensor:
    """Scores of one layer in the shape patterns see, ``[out, in…]``; of a stack, ``[experts * out, in]``.

    A stack is scored expert by expert, as the layers they are: a score sees ``[out, in]`` and the expert's own
    part of the statistics.

    Args:
        importance: The score.
        layer: The layer.
        stats: As :func:`resu.pruning.statistics.collect` gives them: in matrix shape, a Hessian per expert.

    Raises:
        ValueError: As the score raises it, with the layer's name.
    """
    weight, stats = layer.matrix(layer.weight), stats or Stats()
    try:
        if not layer.stacked:
            return importance(weight, dataclasses.replace(stats, parts=input_parts(layer)))
        experts = layer.weight.shape[0]
        parts = zip(weight.chunk(experts), _per_expert(stats, experts, len(weight)), strict=True)
        return torch.cat([importance(part, seen) for part, seen in parts])
    except ValueError as error:
        raise ValueError(f"{layer.name!r}: {error}") from None


def _per_expert(stats: Stats, experts: int, rows: int) -> list[Stats]:
    """Each expert's part: its rows of what has a row per output, its Hessian, and all of what has no rows."""
    hessian = stats.hessian

    def rows_of(value: Tensor | None, i: int) -> Tensor | None:
        own = value is not None and value.ndim >= 2 and value.shape[0] == rows
        return value.chunk(experts)[i] if own and value is not None else value

    return [
        dataclasses.replace(
            stats,
            grad=rows_of(stats.grad, i),
            grad_squared=rows_of(stats.grad_squared, i),
            input_norm=rows_of(stats.input_norm, i),
            input_mean=rows_of(stats.input_mean, i),
            hessian=hessian[i] if hessian is not None and hessian.ndim == 3 else hessian,
        )
        for i in range(experts)
    ]
