"""What an importance is: a function ``(weight, stats) -> scores`` and what it needs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from resu.core.registry import Registry
from resu.pruning.statistics import NEEDS, Stats

__all__ = ["Importance", "importances", "input_norms", "mean_gradient", "register_importance", "wide"]

Score = Callable[[Tensor, Stats], Tensor]


@dataclass(frozen=True)
class Importance:
    """A score per weight, higher = keep.

    Attributes:
        name: As registered.
        score: ``(weight [out, in…], stats) -> scores`` of the weight's shape.
        needs: Which statistics it looks at, of ``{"inputs", "grads", "hessian"}``.
        scope: Where weights compete unless asked otherwise: ``"tensor"`` or ``"row"``.
    """

    name: str
    score: Score
    needs: frozenset[str] = frozenset()
    scope: str = "tensor"

    def __call__(self, weight: Tensor, stats: Stats | None = None) -> Tensor:
        """Scores of ``weight``, of its shape.

        Raises:
            ValueError: If a needed statistic is missing, or the score returns another shape.
        """
        stats = stats or Stats()
        if "grads" in self.needs and stats.grad is None and stats.grad_squared is None:
            raise ValueError(
                f"importance {self.name!r} needs gradients and there are none; call backward() first, or pass data "
                "and a loss function"
            )
        if "inputs" in self.needs and stats.input_norm is None:
            raise ValueError(f"importance {self.name!r} needs input norms and there are none; pass data")
        if "hessian" in self.needs and stats.hessian is None:
            raise ValueError(f"importance {self.name!r} needs a Hessian and there is none; pass data")
        with torch.no_grad():
            scores = self.score(weight.detach(), stats)
        if scores.shape != weight.shape:
            raise ValueError(
                f"importance {self.name!r} returned scores of shape {tuple(scores.shape)} for a weight of shape "
                f"{tuple(weight.shape)}"
            )
        return scores


importances: Registry[Importance] = Registry("importance")


def register_importance(
    name: str, needs: Collection[str] = (), *, scope: str = "tensor", replace: bool = False
) -> Callable[[Score], Score]:
    """Decorator that makes a score known by name, everywhere a method name is taken.

    Args:
        name: Its name.
        needs: Statistics it looks at, of ``"inputs"``, ``"grads"``, ``"hessian"``; only these are collected.
        scope: Where weights compete by default: ``"tensor"`` or ``"row"``.
        replace: Whether a registered score of that name may be replaced.

    Raises:
        ValueError: On an unknown need or scope, or a name that is taken.

    Example:
        >>> from resu.pruning.importance import importances, register_importance
        >>> @register_importance("cubed", replace=True)
        ... def cubed(weight, stats):
        ...     return weight.abs() ** 3
        >>> importances["cubed"](torch.tensor([[1.0, -2.0]]))
        tensor([[1., 8.]])
    """
    unknown = set(needs) - NEEDS
    if unknown:
        raise ValueError(f"unknown need {', '.join(sorted(unknown))}; known: {', '.join(sorted(NEEDS))}")
    if scope not in ("tensor", "row"):
        raise ValueError(f"scope must be 'tensor' or 'row', got {scope!r}")

    def add(score: Score) -> Score:
        importances.register(name, replace=replace)(Importance(name, score, frozenset(needs), scope))
        return score

    return add


def wide(x: Tensor) -> Tensor:
    """At least float32: products of half-precision numbers underflow."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_gradient(stats: Stats, name: str) -> Tensor:
    """The mean gradient, or an error that names the score that needs it."""
    if stats.grad is None:
        raise ValueError(f"importance {name!r} needs the mean gradient")
    return stats.grad


def input_norms(weight: Tensor, stats: Stats) -> Tensor:
    """The norms of a layer's inputs in a shape that multiplies ``weight`` ``[out, in…]``, on its device.

    Raises:
        ValueError: If they do not fit.
    """
    norm = stats.input_norm
    assert norm is not None
    if norm.ndim == 1 and weight.ndim > 2:  # per input channel of a convolution
        norm = norm.view(-1, *[1] * (weight.ndim - 2))
    if norm.ndim > weight.ndim or any(
        n not in (1, w) for n, w in zip(reversed(norm.shape), reversed(weight.shape), strict=False)
    ):
        raise ValueError(f"input norms of shape {tuple(norm.shape)} do not fit a weight of shape {tuple(weight.shape)}")
    return norm.to(weight.device)
