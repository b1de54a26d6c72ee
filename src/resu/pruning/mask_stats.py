"""Figures about masks: counts of one set, and what differs between two."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from resu.core.mask import SparseMask, count_bits

__all__ = ["compute_sparsity_stats", "diff_masks", "packed_masks"]


def packed_masks(masks: Mapping[str, Tensor | SparseMask], what: str = "masks") -> dict[str, SparseMask]:
    """Masks as :class:`SparseMask` by name, bool tensors packed.

    Raises:
        TypeError: If it is no mapping, or a mask is not bool (the name is said).
    """
    if not isinstance(masks, Mapping):
        raise TypeError(f"{what} must be a mapping {{name: mask}}, got {type(masks).__name__}")
    result = {}
    for name, mask in masks.items():
        try:
            result[name] = mask if isinstance(mask, SparseMask) else SparseMask(mask)
        except TypeError as error:
            raise TypeError(f"mask {name!r}: {error}") from None
    return result


def compute_sparsity_stats(masks: Mapping[str, Tensor | SparseMask]) -> dict[str, Any]:
    """Counts and sparsities, over all masks and for each.

    Returns:
        ``["global"]`` with ``sparsity, mean_layer_sparsity, std_layer_sparsity, n_active, n_pruned, numel, n_layers``;
        ``["per_layer"][name]`` with ``sparsity, n_active, n_pruned, numel, shape``.

    Example:
        >>> import torch
        >>> stats = compute_sparsity_stats({"a": torch.tensor([True, False]), "b": torch.tensor([True, True])})
        >>> stats["global"]["sparsity"], stats["per_layer"]["a"]["sparsity"]
        (0.25, 0.5)
    """
    packed = packed_masks(masks)
    numel = sum(mask.numel for mask in packed.values())
    pruned = sum(mask.n_pruned for mask in packed.values())
    each = [mask.sparsity for mask in packed.values()]
    mean = math.fsum(each) / len(each) if each else 0.0
    variance = math.fsum((s - mean) ** 2 for s in each) / len(each) if each else 0.0
    return {
        "global": {
            "sparsity": pruned / numel if numel else 0.0,
            "mean_layer_sparsity": mean,
            "std_layer_sparsity": math.sqrt(variance),
            "n_active": numel - pruned,
            "n_pruned": pruned,
            "numel": numel,
            "n_layers": len(each),
        },
        "per_layer": {
            name: {
                "sparsity": mask.sparsity,
                "n_active": mask.n_active,
                "n_pruned": mask.n_pruned,
                "numel": mask.numel,
                "shape": tuple(mask.shape),
            }
            for name, mask in packed.items()
        },
    }


def check_same_names(a: Mapping[str, SparseMask], b: Mapping[str, SparseMask]) -> None:
    """Two sets of masks describe the same weights.

    Raises:
        ValueError: If names differ (all of them are listed) or a shape does.
    """
    if set(a) != set(b):
        parts = [
            f"only in the {which}: {', '.join(map(repr, sorted(only)))}"
            for which, only in (("first", set(a) - set(b)), ("second", set(b) - set(a)))
            if only
        ]
        raise ValueError(f"the two sets of masks name different weights; {'; '.join(parts)}")
    for name, mask in a.items():
        if mask.shape != b[name].shape:
            raise ValueError(f"mask {name!r} has shape {tuple(mask.shape)} and {tuple(b[name].shape)}")


def diff_masks(a: Mapping[str, Tensor | SparseMask], b: Mapping[str, Tensor | SparseMask]) -> dict[str, dict[str, Any]]:
    """What changed from masks ``a`` to masks ``b``.

    Works on packed bits, an eighth of a byte per weight; linear in the number of weights.

    Args:
        a: ``{name: mask}`` before.
        b: The same names and shapes after.

    Returns:
        ``["global"]`` and ``["per_layer"][name]``, each with

        - ``numel``, ``kept_before``, ``kept_after``;
        - ``born``: pruned before and kept after; ``dead``: kept before and pruned after; ``common``: kept in both;
        - ``hamming``: positions that differ, born + dead;
        - ``churn``: hamming / (kept_before + kept_after): 0.0 for equal masks, 1.0 where nothing is common, and where
          the counts are equal the fraction of kept weights that was exchanged;
        - ``jaccard``: common / (positions kept in either); 1.0 where neither keeps anything.

        Plain numbers, ready for JSON.

    Raises:
        TypeError: If a mask is not bool.
        ValueError: If names or shapes differ; names are listed.

    Example:
        >>> import torch
        >>> before, after = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
        >>> diff_masks({"w": before}, {"w": after})["global"]
        {'numel': 4, 'kept_before': 2, 'kept_after': 2, 'born': 1, 'dead': 1, 'common': 1, 'hamming': 2,
         'churn': 0.5, 'jaccard': 0.3333333333333333}
    """
    before, after = packed_masks(a, "the first masks"), packed_masks(b, "the second masks")
    check_same_names(before, after)
    counts = {name: _counts(mask, after[name]) for name, mask in before.items()}
    keys = ("numel", "kept_before", "kept_after", "common")
    total = {key: sum(each[key] for each in counts.values()) for key in keys}
    return {"global": _figures(total), "per_layer": {name: _figures(each) for name, each in counts.items()}}


def _counts(a: SparseMask, b: SparseMask) -> dict[str, int]:
    common = int(count_bits(a.packed & b.packed.to(a.device)).sum())
    return {"numel": a.numel, "kept_before": a.n_active, "kept_after": b.n_active, "common": common}


def _figures(counts: Mapping[str, int]) -> dict[str, Any]:
    numel, before, after, common = (counts[key] for key in ("numel", "kept_before", "kept_after", "common"))
    born, dead = after - common, before - common
    kept, either = before + after, before + after - common
    return {
        "numel": numel,
        "kept_before": before,
        "kept_after": after,
        "born": born,
        "dead": dead,
        "common": common,
        "hamming": born + dead,
        "churn": (born + dead) / kept if kept else 0.0,
        "jaccard": common / either if either else 1.0,
    }
