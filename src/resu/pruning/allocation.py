"""Allocations: how a model's budget of kept weights is divided over its layers.

An allocation is a function ``(shapes, sparsity, scores) -> {name: keep}`` of exact counts. Register one with
``@allocations.register("name")`` and it works wherever a distribution is taken by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from fractions import Fraction

import torch
from torch import Tensor

from resu.core.counting import check_finite, check_sparsity, keep_count, largest_remainder, top_k_mask
from resu.core.registry import Registry

__all__ = ["Allocation", "allocate", "allocations", "global_masks", "match_sparsities"]

Allocation = Callable[[Mapping[str, torch.Size], float, Mapping[str, Tensor] | None], dict[str, int]]

allocations: Registry[Allocation] = Registry("distribution")


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
        distribution: ``"uniform"``, ``"er"``, ``"erk"``, ``"global"`` or another registered name; or a mapping
            ``{glob: sparsity}`` over parameter or module names, where the first glob that matches a layer
            counts, layers matched by none stay dense, and ``sparsity`` is not used (floor count per layer); or a
            function ``(shapes, sparsity, scores) -> {name: keep}``.
        shapes: Shape of each layer's weight.
        sparsity: Fraction of all weights removed, in [0, 1).
        scores: Higher = keep, of the weights' shapes; needed by ``"global"``.

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
        return {name: keep_count(n, matched.get(name, 0.0)) for name, n in _sizes(shapes).items()}
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

    def matches(glob: str, name: str) -> bool:
        return fnmatchcase(name, glob) or fnmatchcase(name.rpartition(".")[0], glob)

    if not sparsities:
        raise ValueError("the mapping of sparsities is empty; write for example {'*': 0.5}")
    for glob, value in sparsities.items():
        check_sparsity(value, f"sparsity of {glob!r}")
        if not any(matches(glob, name) for name in names):
            raise ValueError(f"the glob {glob!r} matches no layer; layers are: {', '.join(names)}")
    found = {name: next((s for glob, s in sparsities.items() if matches(glob, name)), None) for name in names}
    return {name: s for name, s in found.items() if s is not None}


def _sizes(shapes: Mapping[str, torch.Size]) -> dict[str, int]:
    return {name: math.prod(shape) for name, shape in shapes.items()}


@allocations.register("uniform")
def uniform(
    shapes: Mapping[str, torch.Size], sparsity: float, scores: Mapping[str, Tensor] | None = None
) -> dict[str, int]:
    """The same sparsity in every layer, up to rounding."""
    sizes = _sizes(shapes)
    total = sum(sizes.values())
    keep = keep_count(total, sparsity)
    return largest_remainder(keep, {name: Fraction(n * keep, total) for name, n in sizes.items()}, sizes)


@allocations.register("er")
def er(shapes: Mapping[str, torch.Size], sparsity: float, scores: Mapping[str, Tensor] | None = None) -> dict[str, int]:
    """Erdős–Rényi: density proportional to ``(in + out) / (in * out)`` (Mocanu et al., arXiv 1707.04780, eq. 1)."""
    return _proportional(shapes, sparsity, {k: sum(s[:2]) * math.prod(s[2:]) for k, s in shapes.items()})


@allocations.register("erk")
def erk(
    shapes: Mapping[str, torch.Size], sparsity: float, scores: Mapping[str, Tensor] | None = None
) -> dict[str, int]:
    """Erdős–Rényi kernel: as ``er`` with the kernel's dimensions in the sum (Evci et al., arXiv 1911.11134, §3)."""
    return _proportional(shapes, sparsity, {k: sum(s) for k, s in shapes.items()})


def _proportional(shapes: Mapping[str, torch.Size], sparsity: float, weights: dict[str, int]) -> dict[str, int]:
    """Keep counts proportional to ``weights``; layers that would exceed their size are dense.

    ``epsilon * weights[l]`` is layer l's count, with epsilon solved again each time layers become dense. A
    dense layer leaves more to the others, so all that exceed can be taken at once, and none comes back.
    """
    sizes = _sizes(shapes)
    total = keep_count(sum(sizes.values()), sparsity)
    free, left = list(sizes), total
    epsilon = Fraction(0)
    while free:
        epsilon = Fraction(left, sum(weights[k] for k in free))
        dense = {k for k in free if epsilon * weights[k] >= sizes[k]}
        if not dense:
            break
        left -= sum(sizes[k] for k in dense)
        free = [k for k in free if k not in dense]
    quotas = {k: Fraction(n) for k, n in sizes.items()} | {k: epsilon * weights[k] for k in free}
    return largest_remainder(total, quotas, sizes)


@allocations.register("global")
def global_top_k(
    shapes: Mapping[str, torch.Size], sparsity: float, scores: Mapping[str, Tensor] | None = None
) -> dict[str, int]:
    """The exact top-k over all layers together; ties keep the earlier layer, then the lower index.

    A layer that would keep nothing keeps its best weight, in place of the lowest-ranked weights elsewhere.
    """
    if scores is None or set(scores) != set(shapes):
        missing = sorted(set(shapes) - set(scores or ()))
        raise ValueError(f"distribution 'global' ranks scores of all layers together; none given for {missing}")
    for name, shape in shapes.items():
        if scores[name].shape != shape:
            raise ValueError(f"scores of {name!r} have shape {tuple(scores[name].shape)}, its weight {tuple(shape)}")
    masks = global_masks({name: scores[name] for name in shapes}, sparsity)
    return {name: int(mask.sum()) for name, mask in masks.items()}


def global_masks(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Bool masks of the exact top-k over all layers together: what ``"global"`` counts. O(n) time.

    Raises:
        ValueError: On NaN or infinite scores, or fewer kept weights than layers.
    """
    for name, score in scores.items():
        check_finite(score, f"scores of {name!r}")
    sizes = _sizes({name: score.shape for name, score in scores.items()})
    total = keep_count(sum(sizes.values()), sparsity)
    if total < len(sizes):
        raise ValueError(
            f"sparsity {sparsity!r} keeps {total} weights, fewer than the {len(sizes)} layers that keep one each"
        )
    device = next(iter(scores.values())).device
    rescued: dict[str, Tensor] = {}
    while True:
        names = [name for name in scores if name not in rescued]
        joined = torch.cat([scores[name].detach().reshape(-1).to(device) for name in names])
        parts = top_k_mask(joined, total - len(rescued)).split([sizes[name] for name in names])
        masks = {name: part.view(scores[name].shape) for name, part in zip(names, parts, strict=True)}
        empty = [name for name, mask in masks.items() if not bool(mask.any())]
        if not empty:
            return {name: rescued[name] if name in rescued else masks[name] for name in scores}
        rescued |= {name: top_k_mask(scores[name].detach(), 1) for name in empty}
