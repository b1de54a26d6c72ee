"""Whether the zeros are where the masks say, position by position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from resu.core.globs import listing
from resu.core.mask import CHUNK, SparseMask, count_bits, unpack_bits
from resu.pruning.mask_stats import packed_masks
from resu.pruning.sparse_lora.apply import get_lora_layers

__all__ = ["validate_sparsity_preserved"]


@torch.no_grad()
def validate_sparsity_preserved(
    model: nn.Module, masks: Mapping[str, Tensor | SparseMask], tolerance: float = 1e-6
) -> tuple[bool, dict[str, Any]]:
    """Look at every pruned position of the stored weights: of layers with adapters, merged or not, and of plain ones.

    A position is a violation where the mask says pruned and the weight is above ``tolerance`` in absolute value, or
    NaN. Nothing is averaged: one such position among any number is found. What is not exactly zero is counted as
    well (``"nonzero"``), so that a tolerance hides nothing; 0 as tolerance makes the two the same. Of a packed base the
    mask bits themselves are compared: a position that they keep and ``masks`` prunes is a violation.

    It speaks of weights as they are stored: while an adapter in ``sparse_to_dense`` acts without being merged, the
    sparse base is stored and the weight that acts is dense.

    Args:
        model: Any module, with adapters or without.
        masks: ``{parameter name: mask}``, True = kept.
        tolerance: Largest absolute value of a pruned position.

    Returns:
        ``(ok, report)``, with ``ok`` that there is no violation. ``report["global"]`` has ``total_violations,
        violation_rate`` (of the pruned positions)``, nonzero, max_abs, n_pruned, n_layers, tolerance``;
        ``report["per_layer"][name]`` has ``violations, violation_rate, nonzero, max_abs, n_pruned, sparsity`` (of the
        mask).

    Raises:
        ValueError: If a mask names no parameter or does not fit, or ``tolerance`` is negative or no number.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.5]]))
        >>> ok, report = validate_sparsity_preserved(model, {"weight": torch.tensor([[True, False]])})
        >>> ok, report["global"]["total_violations"], report["per_layer"]["weight"]["max_abs"]
        (False, 1, 0.5)
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be a number of 0 or more, got {tolerance!r}")
    layers, known = get_lora_layers(model), dict(model.named_parameters(remove_duplicate=False))
    per_layer = {}
    for name, mask in packed_masks(masks).items():
        packed = name in layers and name not in known
        if not packed and name not in known:
            raise ValueError(f"the model has no parameter {name!r}; it has: {listing(known) or 'none'}")
        shape = layers[name].weight_shape if packed else known[name].shape
        if shape != mask.shape:
            raise ValueError(f"mask {name!r} has shape {tuple(mask.shape)}, the parameter {tuple(shape)}")
        if packed:
            own = layers[name].mask
            extra = int(count_bits(own.packed & ~mask.to(own.device).packed).sum())
            found = (extra, extra, float("nan") if extra else 0.0)
        else:
            found = _strayed(known[name], mask.to(known[name].device), tolerance)
        violations, nonzero, largest = found
        per_layer[name] = {
            "violations": violations,
            "violation_rate": violations / mask.n_pruned if mask.n_pruned else 0.0,
            "nonzero": nonzero,
            "max_abs": largest,
            "n_pruned": mask.n_pruned,
            "sparsity": mask.sparsity,
        }
    total = sum(one["violations"] for one in per_layer.values())
    n_pruned = sum(one["n_pruned"] for one in per_layer.values())
    report = {
        "global": {
            "total_violations": total,
            "violation_rate": total / n_pruned if n_pruned else 0.0,
            "nonzero": sum(one["nonzero"] for one in per_layer.values()),
            "max_abs": float(torch.tensor([0.0, *(one["max_abs"] for one in per_layer.values())]).max()),
            "n_pruned": n_pruned,
            "n_layers": len(per_layer),
            "tolerance": tolerance,
        },
        "per_layer": per_layer,
    }
    return total == 0, report


def _strayed(weight: Tensor, mask: SparseMask, tolerance: float) -> tuple[int, int, float]:
    """Pruned positions above ``tolerance``, pruned positions that are not zero, and the largest of them."""
    rows = mask.packed.shape[0]
    columns = mask.numel // rows if rows else 0
    step = max(1, CHUNK // max(columns, 1))
    violations, nonzero, largest = 0, 0, 0.0
    for r0 in range(0, rows, step):
        r1 = min(r0 + step, rows)
        # A vector is one row.
        part = weight.detach().reshape(rows, columns)[r0:r1] if weight.ndim < 2 else weight.detach()[r0:r1]
        here = part.reshape(r1 - r0, columns).masked_fill(unpack_bits(mask.packed[r0:r1], (r1 - r0, columns)), 0).abs()
        nonzero += int(torch.count_nonzero(here))
        violations += int((~(here <= tolerance)).sum())  # NaN is above any
        largest = float(torch.maximum(torch.tensor(largest), here.max().float().cpu())) if here.numel() else largest
    return violations, nonzero, largest
