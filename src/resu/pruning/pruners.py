"""Pruners: objects that prune a model in place and remember what they did."""

from __future__ import annotations

import inspect
from typing import Any

from resu.pruning.compression import CompressionStats
from resu.pruning.gradual_pruner import GradualPruner
from resu.pruning.holding import hold_masks
from resu.pruning.magnitude_pruner import MagnitudePruner
from resu.pruning.pruner import Pruner, pruners
from resu.pruning.stages import plan_stages, prune_iteratively
from resu.pruning.structured.pruner import StructuredPruner

__all__ = [
    "CompressionStats",
    "GradualPruner",
    "MagnitudePruner",
    "Pruner",
    "StructuredPruner",
    "create_pruner",
    "hold_masks",
    "plan_stages",
    "prune_iteratively",
    "pruners",
]


def create_pruner(name: str, **options: Any) -> Any:
    """A registered pruner by name.

    Args:
        name: ``"magnitude"``, ``"gradual"``, or one registered with ``@pruners.register("name")``.
        **options: Of that pruner.

    Raises:
        ValueError: On an unknown name or option; the known ones are listed.

    Example:
        >>> create_pruner("magnitude", sparsity=0.8).sparsity
        0.8
        >>> create_pruner("magnitud")
        Traceback (most recent call last):
        ValueError: unknown pruner 'magnitud'; known: ...magnitude...
    """
    make = pruners[name]
    signature = inspect.signature(make)
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
    unknown = [] if takes_all else sorted(set(options) - set(signature.parameters))
    if unknown:
        raise ValueError(
            f"pruner {name!r} has no option {', '.join(map(repr, unknown))}; it has: {', '.join(signature.parameters)}"
        )
    missing = [
        p.name
        for p in signature.parameters.values()
        if p.default is p.empty and p.name not in options and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if missing:
        raise ValueError(f"pruner {name!r} also needs {', '.join(missing)}")
    return make(**options)
