"""What an allocation is, and the one call that runs any of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from resu.core.counting import check_sparsity, keep_count
from resu.core.globs import glob_matches
from resu.core.registry import Registry

__all__ = [
    "Allocation",
    "allocate",
    "allocations",
    "described",
    "ignores_scores",
    "layer_sizes",
    "match_sparsities",
    "needed_scores",
    "needs_scores",
]

Allocation = Callable[[Mapping[str, torch.Size], float, Mapping[str, Tensor] | None], dict[str, int]]

allocations: Registry[Allocation] = Registry("distribution")

_IGNORING: list[Allocation] = []


def ignores_scores(allocation: Allocation) -> Allocation:
    """Decorator that says an allocation looks at shapes and sparsity alone, so that no scores are made for it."""
    _IGNORING.append(allocation)
    return allocation


def needs_scores(distribution: str | Mapping[str, float] | Allocation | None) -> bool:
    """Whether :func:`allocate` looks at scores for this distribution; a function does unless it says otherwise.

    Raises:
        ValueError: On an unknown name.

    Example:
        >>> needs_scores("erk"), needs_scores("global"), needs_scores({"fc1": 0.5})
        (False, True, False)
    """
    if distribution is None or isinstance(distribution, Mapping):
        return False
    function = allocations[distribution] if isinstance(distribution, str) else distribution
    return not any(function is one for one in _IGNORING)


def described(distribution: str | Mapping[str, float] | Allocation | None) -> Any:
    """Plain JSON that stands for a distribution in a report or a saved state."""
    if distribution is None or isinstance(distribution, str):
        return distribution
    if isinstance(distribution, Mapping):
        return dict(distribution)
    # Without its address, which is another in every process.
    return f"{distribution.__module__}.{getattr(distribution, '__qualname__', type(distribution).__name__)}"


def allocate(
    distribution: str | Mapping[str, float] | Allocation,
    shapes: Mapping[str, torch.Size],
    sparsity: float,
    scores: Mapping[str, Tensor] | None = None,
) -> dict[str, int]:
    """How many weights each layer keeps, as exact integers.

    With a name, the counts add up to ``N - floor(N * sparsity)`` over all ``N`` weights exactly, and every
    layer keeps at least one weight.

    Args:
        distribution: ``"uniform"``, ``"er"``, ``"erk"``, ``"global"``, ``"lamp"``, ``"owl"`` or another registered
            name; or a mapping ``{glob: sparsity}`` over parameter or module names, where the first glob that matches a
            layer counts, layers matched by none stay dense, and ``sparsity`` is not used (floor count per layer); or a
            function ``(shapes, sparsity, scores) -> {name: keep}``.
        shapes: Shape of each layer's weight.
        sparsity: Fraction of all weights removed, in [0, 1).
        scores: Higher = keep, of the weights' shapes; needed where :func:`needs_scores` says so.

    Returns:
        ``{name: keep}`` in the order of ``shapes``, with ``1 <= keep <= numel``.

    Raises:
        ValueError: On an unknown name (the known ones are listed), a glob that matches nothing, an empty
            layer, a budget that cannot give each layer one weight, or missing, misshapen or NaN scores.

    Example:
        >>> shapes = {"fc1.weight": torch.Size([8, 4]), "fc2.weight": torch.Size([2, 8])}
        >>> allocate("uniform", shapes, 0.5)
        {'fc1.weight': 16, 'fc2.weight': 8}
        >>> allocate({"fc1": 0.75}, shapes, 0.0)
        {'fc1.weight': 8, 'fc2.weight': 16}
    """
    if not shapes:
        raise ValueError("there is no layer to allocate a budget to")
    for name, shape in shapes.items():
        if math.prod(shape) == 0:
            raise ValueError(f"layer {name!r} has no weights (shape {tuple(shape)}); exclude it")
    if isinstance(distribution, Mapping):
        matched = match_sparsities(distribution, shapes)
        return {name: keep_count(n, matched.get(name, 0.0)) for name, n in layer_sizes(shapes).items()}
    check_sparsity(sparsity)
    if isinstance(distribution, str):
        return allocations[distribution](shapes, sparsity, scores)
    if not callable(distribution):
        raise TypeError(
            "distribution must be a name, a mapping {glob: sparsity} or a function, "
            f"got {type(distribution).__name__}; names: {', '.join(allocations)}"
        )
    return _checked(distribution(shapes, sparsity, scores), shapes)


def _checked(keeps: Mapping[str, int], shapes: Mapping[str, torch.Size]) -> dict[str, int]:
    if set(keeps) != set(shapes):
        raise ValueError(f"the distribution gave counts for {sorted(keeps)}, but the layers are {sorted(shapes)}")
    for name, shape in shapes.items():
        keep, size = keeps[name], math.prod(shape)
        if not isinstance(keep, int) or not 1 <= keep <= size:
            raise ValueError(f"the distribution keeps {keep!r} of {name!r}; allowed: an integer in 1..{size}")
    return {name: keeps[name] for name in shapes}


def match_sparsities(sparsities: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """The sparsity of each layer by the first glob that matches its parameter or module name.

    Args:
        sparsities: ``{glob: sparsity}``, each in [0, 1).
        names: Parameter names of the layers.

    Returns:
        ``{name: sparsity}``; layers matched by no glob are not in it.

    Raises:
        ValueError: If a glob matches nothing, or a sparsity is out of range.

    Example:
        >>> match_sparsities({"fc1": 0.5, "*": 0.9}, ["fc1.weight", "fc2.weight"])
        {'fc1.weight': 0.5, 'fc2.weight': 0.9}
    """
    names = list(names)

    if not sparsities:
        raise ValueError("the mapping of sparsities is empty; write for example {'*': 0.5}")
    for glob, value in sparsities.items():
        check_sparsity(value, f"sparsity of {glob!r}")
        if not any(glob_matches(glob, name) for name in names):
            raise ValueError(f"the glob {glob!r} matches no layer; layers are: {', '.join(names)}")
    found = {name: next((s for glob, s in sparsities.items() if glob_matches(glob, name)), None) for name in names}
    return {name: s for name, s in found.items() if s is not None}


def layer_sizes(shapes: Mapping[str, torch.Size]) -> dict[str, int]:
    """Number of weights of each layer."""
    return {name: math.prod(shape) for name, shape in shapes.items()}


def needed_scores(
    distribution: str, shapes: Mapping[str, torch.Size], scores: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The scores of all layers, in the order of ``shapes``.

    Raises:
        ValueError: If one is missing or of another shape than its weight.
    """
    if scores is None or not set(shapes) <= set(scores):
        missing = sorted(set(shapes) - set(scores or ()))
        raise ValueError(
            f"distribution {distribution!r} looks at the scores of all layers together; none given for {missing}"
        )
    for name, shape in shapes.items():
        if scores[name].shape != shape:
            raise ValueError(f"scores of {name!r} have shape {tuple(scores[name].shape)}, its weight {tuple(shape)}")
    return {name: scores[name].detach() for name in shapes}
