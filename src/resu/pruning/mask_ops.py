"""What one does with masks: check, count, compare, combine, apply, save, load, plot."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from resu.core.mask import SparseMask
from resu.core.mask_files import read_masks, write_masks
from resu.pruning.mask_plots import plot_mask_diff, plot_sparsity_by_layer, plot_sparsity_histogram
from resu.pruning.mask_sets import invert_mask, mask_difference, mask_intersection, mask_union
from resu.pruning.mask_stats import compute_sparsity_stats, diff_masks, packed_masks

__all__ = [
    "apply_masks_to_model",
    "compute_sparsity_stats",
    "diff_masks",
    "invert_mask",
    "load_mask",
    "mask_difference",
    "mask_intersection",
    "mask_union",
    "plot_mask_diff",
    "plot_sparsity_by_layer",
    "plot_sparsity_histogram",
    "save_mask",
    "validate_mask",
]


def validate_mask(
    mask: Tensor | SparseMask, expected_sparsity: float | None = None, tolerance: float | None = None
) -> tuple[bool, dict[str, Any]]:
    """Whether a mask is a mask, and has the sparsity it should have.

    Args:
        mask: Bool tensor or SparseMask, True = kept.
        expected_sparsity: What it should have; None: not compared.
        tolerance: Largest difference allowed; None: less than one weight.

    Returns:
        ``(ok, stats)`` with ``stats["sparsity"]``, ``["n_active"]``, ``["n_pruned"]``, ``["shape"]``, ``["error"]``
        (distance from the expected sparsity, 0.0 if none was given) and ``["problem"]`` (None if ok).

    Raises:
        TypeError: If ``mask`` is not a tensor.

    Example:
        >>> ok, stats = validate_mask(torch.tensor([True, False, False, False]), expected_sparsity=0.7)
        >>> ok, stats["sparsity"], stats["problem"]
        (True, 0.75, None)
    """
    if isinstance(mask, SparseMask):
        kept, n, shape, dtype = mask.n_active, mask.numel, tuple(mask.shape), torch.bool
    elif isinstance(mask, Tensor):
        kept, n, shape, dtype = int(torch.count_nonzero(mask)), mask.numel(), tuple(mask.shape), mask.dtype
    else:
        raise TypeError(f"a mask is a bool tensor or a SparseMask, got {type(mask).__name__}")
    sparsity = (n - kept) / n if n else 0.0
    error = 0.0 if expected_sparsity is None else abs(sparsity - expected_sparsity)
    problem = None
    if dtype != torch.bool:
        problem = f"dtype is {dtype}, a mask is bool (True = kept)"
    elif n == 0:
        problem = "the mask is empty"
    elif kept == 0:
        problem = "the mask keeps nothing"
    elif not (error <= tolerance if tolerance is not None else error * n < 1 - 1e-9):
        problem = f"sparsity is {sparsity:.6g}, expected {expected_sparsity:.6g}"
    stats = {
        "sparsity": sparsity,
        "n_active": kept,
        "n_pruned": n - kept,
        "shape": shape,
        "error": error,
        "problem": problem,
    }
    return problem is None, stats


def apply_masks_to_model(model: nn.Module, masks: Mapping[str, Tensor | SparseMask]) -> nn.Module:
    """Set pruned positions to exactly +0.0, in place; resurrection layers take the mask and hold it.

    On a plain layer nothing holds the zeros: train on under a ``Sparsifier`` or a ``Constraint``.

    Args:
        model: Any module.
        masks: ``{parameter name: mask}``.

    Returns:
        The model.

    Raises:
        ValueError: If a name is not a parameter or a mask has another shape; nothing has changed then.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> _ = apply_masks_to_model(model, {"0.weight": torch.tensor([[True, False]])})
        >>> model[0].weight[0, 1].item()
        0.0
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    packed = packed_masks(masks)
    for name, mask in packed.items():
        if name not in known:
            raise ValueError(f"the model has no parameter {name!r}; it has: {', '.join(known) or 'none'}")
        if known[name].shape != mask.shape:
            raise ValueError(f"mask {name!r} has shape {tuple(mask.shape)}, the parameter {tuple(known[name].shape)}")
    for name, mask in packed.items():
        module_name, _, attribute = name.rpartition(".")
        module = model.get_submodule(module_name)
        set_mask: Any = getattr(module, "set_mask", None)
        if attribute == "weight" and callable(set_mask):
            set_mask(mask)
        else:
            mask.to(known[name].device).apply_(known[name])
    return model


def save_mask(
    masks: Mapping[str, Tensor | SparseMask],
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any] | None = None,
    format: str | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Save masks at one bit per weight, with shapes, counts and checksums; all or nothing.

    Args:
        masks: ``{name: mask}``.
        path: Where.
        metadata: Plain JSON of your own, given back by :func:`load_mask`.
        format: ``"pt"``, ``"npz"`` or ``"safetensors"``; None: by the ending of ``path``.
        overwrite: Whether a file that is there may be replaced.

    Raises:
        FileExistsError: If there is one and ``overwrite`` is False.
        ValueError: On an unknown format.
        TypeError: If a mask is not bool or the metadata is not JSON.
        OSError: If the file cannot be written; what was there before is whole.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_mask({"w": torch.tensor([True, False])}, f"{folder}/m.npz", metadata={"by": "hand"})
        ...     load_mask(f"{folder}/m.npz")
        ({'w': tensor([ True, False])}, {'by': 'hand'})
    """
    write_masks(packed_masks(masks), path, metadata, format, overwrite=overwrite)


def load_mask(path: str | os.PathLike[str], format: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Masks and metadata of a file that :func:`save_mask` wrote; every count and checksum is verified.

    Args:
        path: The file.
        format: As in :func:`save_mask`.

    Returns:
        ``({name: bool tensor}, metadata)``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, damaged (the mask is named), of a newer version, or no mask file. A
            pickle with code in it is refused, not run.
    """
    masks, body = read_masks(path, format)
    return {name: mask.mask for name, mask in masks.items()}, body["metadata"]
