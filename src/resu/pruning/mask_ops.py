"""What one does with masks: check, count, apply, save, load, plot."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resu.core.io import replacing
from resu.core.mask import SparseMask
from resu.core.mask_files import read_masks, write_masks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "apply_masks_to_model",
    "compute_sparsity_stats",
    "load_mask",
    "plot_sparsity_histogram",
    "save_mask",
    "validate_mask",
]


def _packed(masks: Mapping[str, Tensor | SparseMask]) -> dict[str, SparseMask]:
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks must be a mapping {{name: mask}}, got {type(masks).__name__}")
    result = {}
    for name, mask in masks.items():
        try:
            result[name] = mask if isinstance(mask, SparseMask) else SparseMask(mask)
        except TypeError as error:
            raise TypeError(f"mask {name!r}: {error}") from None
    return result


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


def compute_sparsity_stats(masks: Mapping[str, Tensor | SparseMask]) -> dict[str, Any]:
    """Counts and sparsities, over all masks and for each.

    Returns:
        ``["global"]`` with ``sparsity, mean_layer_sparsity, std_layer_sparsity, n_active, n_pruned, numel, n_layers``;
        ``["per_layer"][name]`` with ``sparsity, n_active, n_pruned, numel, shape``.

    Example:
        >>> stats = compute_sparsity_stats({"a": torch.tensor([True, False]), "b": torch.tensor([True, True])})
        >>> stats["global"]["sparsity"], stats["per_layer"]["a"]["sparsity"]
        (0.25, 0.5)
    """
    packed = _packed(masks)
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
    packed = _packed(masks)
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
    write_masks(_packed(masks), path, metadata, format, overwrite=overwrite)


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


def plot_sparsity_histogram(
    masks: Mapping[str, Tensor | SparseMask], save_path: str | os.PathLike[str] | None = None
) -> Figure:
    """How many layers have which sparsity, as a matplotlib figure.

    Args:
        masks: ``{name: mask}``.
        save_path: Where to write it (format by ending; replaces an older plot); None: nowhere.

    Raises:
        ImportError: Without matplotlib; it names the extra to install.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib, which is not installed: pip install 'resu-torch[plots]'") from error
    stats = compute_sparsity_stats(masks)
    figure = Figure(figsize=(6, 4), layout="constrained")  # not pyplot: no window, no global state
    axes = figure.subplots()
    each = [100 * layer["sparsity"] for layer in stats["per_layer"].values()]
    axes.hist(each, bins=20, range=(0, 100), color="tab:blue", edgecolor="white")
    overall = 100 * stats["global"]["sparsity"]
    axes.axvline(overall, color="tab:red", label=f"all weights: {overall:.1f} %")
    axes.set(xlabel="sparsity of the layer (%)", ylabel="layers", title="Sparsity by layer")
    axes.legend()
    if save_path is not None:
        with replacing(save_path, overwrite=True) as temporary:
            figure.savefig(temporary, format=os.path.splitext(save_path)[1].removeprefix(".") or "png")
    return figure
