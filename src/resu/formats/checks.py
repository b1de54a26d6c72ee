"""Checks of one weight and of one mask: what is wrong with it, in words, and the figures behind that."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from resu.core.counting import keep_count
from resu.core.mask import SparseMask
from resu.core.pattern import Pattern

__all__ = [
    "check_counts",
    "check_mask",
    "check_values",
    "check_weight",
    "count_nonzero",
    "expected_counts",
    "nonzero_pruned",
]


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _as_float(values: Tensor) -> Tensor:
    """8-bit floats as float32: torch has few operations for them."""
    return values.float() if values.is_floating_point() and values.element_size() == 1 else values


def count_nonzero(values: Tensor) -> int:
    """How many values are not zero, in any dtype: NaN is not, -0.0 is.

    Example:
        >>> count_nonzero(torch.tensor([0.0, -0.0, 1.0, float("nan")]).to(torch.float8_e4m3fn))
        2
    """
    return int(torch.count_nonzero(_as_float(values)))


def _any_bit(weight: Tensor, mask: SparseMask) -> bool:
    """Whether any bit is set where the mask prunes: much cheaper than to look at the values there."""
    size = weight.element_size()
    words = weight.contiguous().view(_WORDS[size]) if size in _WORDS else weight
    return bool(torch.count_nonzero(mask.zero_(words.clone(), active=True)))


def nonzero_pruned(weight: Tensor, mask: SparseMask) -> int:
    """How many positions that the mask prunes are not zero; -0.0 is zero.

    Example:
        >>> nonzero_pruned(torch.tensor([1.0, -0.0, 3.0]), SparseMask(torch.tensor([True, False, False])))
        1
    """
    return count_nonzero(mask.get_pruned(weight)) if _any_bit(weight, mask) else 0


def check_values(weight: Tensor) -> list[str]:
    """NaN and infinite values of a tensor."""
    values = _as_float(weight)
    if not (values.is_floating_point() or values.is_complex()):
        return []
    if bool(torch.isfinite(values.sum())):
        return []  # one value that is not finite would show in the sum
    odd = values.numel() - int(torch.isfinite(values).sum())
    return [f"holds {odd} NaN or infinite values"] if odd else []


def check_weight(weight: Tensor, mask: SparseMask) -> tuple[list[str], int]:
    """Whether a weight is exactly zero wherever its mask prunes.

    Args:
        weight: Any shape and dtype.
        mask: Its mask.

    Returns:
        ``(problems, minus_zeros)``; -0.0 at a pruned position is a zero and no problem, but counted.

    Example:
        >>> check_weight(torch.tensor([1.0, 2.0, -0.0]), SparseMask(torch.tensor([True, False, False])))
        (['is not zero at 1 of 2 positions its mask prunes'], 1)
    """
    if weight.shape != mask.shape:
        return [f"has shape {tuple(weight.shape)}, its mask {tuple(mask.shape)}"], 0
    if not _any_bit(weight, mask):
        return [], 0
    pruned = _as_float(mask.get_pruned(weight))
    odd = count_nonzero(pruned)
    problems = [f"is not zero at {odd} of {mask.n_pruned} positions its mask prunes"] if odd else []
    minus = int((torch.signbit(pruned) & (pruned == 0)).sum()) if pruned.is_floating_point() else 0
    return problems, minus


def _views(mask: Tensor, transposed: bool) -> Iterable[Tensor]:
    """A mask as ``[out, in…]``, in every orientation its layer may have."""
    yield mask.t() if mask.ndim == 2 and transposed else mask
    if mask.ndim == 3:  # a stack of experts, each [out, in] or [in, out]
        yield mask.flatten(0, 1)
        yield mask.transpose(1, 2).flatten(0, 1)


def check_mask(mask: SparseMask, pattern: Pattern | None = None, *, transposed: bool = False) -> list[str]:
    """Whether a mask keeps something, and its pattern.

    Args:
        mask: The mask.
        pattern: What it should have; None: not checked.
        transposed: Whether a matrix is stored ``[in, out]``, as the ``Conv1D`` of Transformers is. A weight with three
            dimensions may be a stack of experts of either kind, which names do not tell.

    Returns:
        What is wrong, in words.

    Example:
        >>> from resu.core.pattern import NM
        >>> check_mask(SparseMask(torch.ones(2, 4, dtype=torch.bool)), NM(2, 4))
        ['breaks 2:4 in 2 places']
    """
    problems = []
    if mask.numel and not mask.n_active:
        problems.append("keeps nothing")
    if pattern is None or not mask.numel:
        return problems
    try:
        best = min(pattern.violations(view) for view in _views(mask.mask, transposed))
    except (ValueError, IndexError) as error:
        return [*problems, f"cannot have {pattern}: {error}"]
    if best:
        problems.append(f"breaks {pattern} in {best} places")
    return problems


def expected_counts(shapes: Sequence[Sequence[int]], sparsity: float, pattern: Pattern | None = None) -> set[int]:
    """The exact numbers of kept positions that pruning these shapes to ``sparsity`` may give.

    Counts are floored once over all weights (global budgets), once per layer, or once per row; or they are what the
    pattern makes of the sparsity.

    Raises:
        ValueError: If the pattern cannot have the sparsity.

    Example:
        >>> sorted(expected_counts([(2, 5), (2, 5)], 0.5))
        [10, 12]
    """
    sizes = [math.prod(shape) for shape in shapes]
    rows = [(shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape)) for shape in shapes]
    # A stack of experts has a row for each output of each expert.
    flat = [(shape[0] * shape[1], shape[2]) if len(shape) == 3 else tuple(shape) for shape in shapes]
    stacked = [
        (one[0], math.prod(one[1:])) if len(shape) == 3 else row
        for shape, one, row in zip(shapes, flat, rows, strict=True)
    ]
    counts = {
        keep_count(sum(sizes), sparsity, allow_empty=True),
        sum(keep_count(n, sparsity) for n in sizes if n),
        *(sum(n * keep_count(width, sparsity) for n, width in each if n * width) for each in (rows, stacked)),
    }
    if pattern is not None:
        counts |= {sum(pattern.keep_for(shape, sparsity) for shape in each) for each in (shapes, flat)}
    return counts


def check_counts(masks: Mapping[str, SparseMask], sparsity: float, pattern: Pattern | None = None) -> list[str]:
    """Whether all masks together keep one of the exact counts that ``sparsity`` means."""
    kept, numel = sum(mask.n_active for mask in masks.values()), sum(mask.numel for mask in masks.values())
    try:
        expected = expected_counts([mask.shape for mask in masks.values()], sparsity, pattern)
    except ValueError as error:
        return [str(error)]
    if kept in expected:
        return []
    nearest = min(expected, key=lambda count: abs(count - kept))
    actual = (numel - kept) / numel if numel else 0.0
    return [f"keep {kept} of {numel} weights, sparsity {actual:.6g}; sparsity {sparsity:g} keeps {nearest}"]


def check_report(report: Mapping[str, Any], masks: Mapping[str, SparseMask]) -> dict[str, str]:
    """What ``pruning.json`` says of each layer against the masks: ``{name: what is wrong}``."""
    wrong = {}
    for layer in report.get("layers", ()):
        name, kept = layer.get("name"), layer.get("kept")
        if name not in masks:
            wrong[str(name)] = "is in pruning.json, but has no mask"
        elif kept != masks[name].n_active:
            wrong[str(name)] = f"keeps {masks[name].n_active} weights, pruning.json says {kept}"
    return wrong
