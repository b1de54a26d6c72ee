"""Masks as sets of kept positions: union, intersection, difference, and what is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar, cast

from torch import Tensor

from resu.core.mask import SparseMask
from resu.pruning.mask_stats import check_same_names, packed_masks

__all__ = ["invert_mask", "mask_difference", "mask_intersection", "mask_union"]

# One mask or a mapping of them; what goes in comes out.
M = TypeVar("M", SparseMask, Tensor, Mapping[str, SparseMask], Mapping[str, Tensor], Mapping[str, Tensor | SparseMask])

_ONE = "mask"


def _named(masks: object, what: str) -> dict[str, SparseMask]:
    if isinstance(masks, Mapping):
        return packed_masks(masks, what)
    if isinstance(masks, (Tensor, SparseMask)):
        return packed_masks({_ONE: masks})
    raise TypeError(f"{what} must be a mask (bool tensor or SparseMask) or {{name: mask}}, got {type(masks).__name__}")


def _as(given: M, result: dict[str, SparseMask]) -> M:
    """The result in the form of the first operand: bool tensors stay bool tensors."""

    def one(like: object, mask: SparseMask) -> SparseMask | Tensor:
        return mask if isinstance(like, SparseMask) else mask.mask

    if isinstance(given, Mapping):
        return cast(M, {name: one(given[name], mask) for name, mask in result.items()})
    return cast(M, one(given, result[_ONE]))


def _combine(a: M, b: M, bits: Callable[[Tensor, Tensor], Tensor]) -> M:
    first, second = _named(a, "the first masks"), _named(b, "the second masks")
    if isinstance(a, Mapping) != isinstance(b, Mapping):
        raise TypeError("give two masks or two mappings {name: mask}, not one of each")
    check_same_names(first, second)
    return _as(
        a,
        {
            # Padding bits are 0 in both, and stay so under and, or, and-not.
            name: SparseMask.from_packed(bits(mask.packed, second[name].packed.to(mask.device)), mask.shape)
            for name, mask in first.items()
        },
    )


def mask_union(a: M, b: M) -> M:
    """Positions kept in ``a`` or in ``b``.

    Works on packed bits: one pass over an eighth of a byte per weight.

    Args:
        a: A mask (bool tensor or SparseMask), or ``{name: mask}``.
        b: The same kind, names and shapes.

    Returns:
        In the form of ``a``: SparseMask for SparseMask, bool tensor for bool tensor, mapping for mapping.

    Raises:
        TypeError: If a mask is not bool.
        ValueError: If names differ (they are listed) or shapes do.

    Example:
        >>> import torch
        >>> mask_union(torch.tensor([True, False, False]), torch.tensor([False, False, True]))
        tensor([ True, False,  True])
    """
    return _combine(a, b, lambda x, y: x | y)


def mask_intersection(a: M, b: M) -> M:
    """Positions kept in ``a`` and in ``b``; otherwise as :func:`mask_union`.

    Example:
        >>> import torch
        >>> mask_intersection(torch.tensor([True, True, False]), torch.tensor([False, True, True]))
        tensor([False,  True, False])
    """
    return _combine(a, b, lambda x, y: x & y)


def mask_difference(a: M, b: M) -> M:
    """Positions kept in ``a`` and pruned in ``b``; otherwise as :func:`mask_union`.

    Example:
        >>> import torch
        >>> mask_difference(torch.tensor([True, True, False]), torch.tensor([False, True, True]))
        tensor([ True, False, False])
    """
    return _combine(a, b, lambda x, y: x & ~y)


def invert_mask(mask: M) -> M:
    """Kept becomes pruned and the other way round.

    Args:
        mask: A mask (bool tensor or SparseMask), or ``{name: mask}``.

    Returns:
        In the form of ``mask``.

    Raises:
        TypeError: If a mask is not bool.

    Example:
        >>> import torch
        >>> invert_mask({"w": torch.tensor([True, False])})
        {'w': tensor([False,  True])}
    """
    return _as(mask, {name: _inverted(one) for name, one in _named(mask, "masks").items()})


def _inverted(mask: SparseMask) -> SparseMask:
    bits = ~mask.packed
    columns = mask.numel // max(bits.shape[0], 1)
    if columns % 8 and bits.numel():
        bits[:, -1] &= (1 << columns % 8) - 1  # padding stays 0
    return SparseMask.from_packed(bits, mask.shape)
