"""What a pruner is, where pruners are known by name, and what their histories say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from resu.core.mask import SparseMask
from resu.core.registry import Registry

__all__ = ["Pruner", "check_pruner", "pruners", "record"]


class Pruner(Protocol):
    """What :class:`~resu.pruning.pruners.GradualPruner` and ``prune_iteratively`` ask of a pruner."""

    @property
    def sparsity(self) -> float | Mapping[str, float]:
        """Fraction removed unless a call says otherwise."""
        ...

    def compute_masks(
        self, model: nn.Module, sparsity: float | None = None, *, within: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """``{parameter name: bool mask}`` that keeps nothing outside ``within``; the model is not changed."""
        ...


pruners: Registry[Callable[..., Any]] = Registry("pruner")


def check_pruner(pruner: object) -> None:
    """Raise ``TypeError`` unless this is a pruner, or None."""
    if pruner is not None and not callable(getattr(pruner, "compute_masks", None)):
        raise TypeError(
            "expected a pruner, for example MagnitudePruner(0.5) or create_pruner('magnitude', sparsity=0.5); "
            f"got {pruner!r}"
        )


def record(
    masks: Mapping[str, Tensor | SparseMask], earlier: Mapping[str, Tensor | SparseMask], sparsity: Any
) -> dict[str, Any]:
    """One entry of a history, plain JSON: what was asked, what is so, and what is newly pruned."""
    layers: dict[str, dict[str, Any]] = {}
    newly = 0
    for name, given in masks.items():
        mask = given.mask if isinstance(given, SparseMask) else given
        kept, n = int(torch.count_nonzero(mask)), mask.numel()
        layers[name] = {"kept": kept, "numel": n, "sparsity": (n - kept) / n if n else 0.0}
        before = earlier.get(name)
        if before is None:
            newly += n - kept
        else:
            old = before.mask if isinstance(before, SparseMask) else before
            newly += int(torch.count_nonzero(old & ~mask.to(old.device)))
    kept, n = sum(x["kept"] for x in layers.values()), sum(x["numel"] for x in layers.values())
    return {
        "sparsity": sparsity,
        "actual": (n - kept) / n if n else 0.0,
        "kept": kept,
        "numel": n,
        "newly_pruned": newly,
        "layers": layers,
    }
