"""What is in a file: rows of a table for checkpoints and masks, without a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resu.core.io import FileFormatError, open_header
from resu.core.mask import SparseMask
from resu.core.mask_files import MASK_FORMATS, MASK_HEADER, read_masks
from resu.formats.bitmask import bitmask_prefixes, take_bitmask, unpack_bitmask
from resu.formats.files import (
    CHECKPOINT_HEADER,
    EXTRA_PREFIX,
    MASK_PREFIX,
    VERSION,
    parse_checkpoint,
    read_safetensors,
)

__all__ = ["describe"]

_MODES = ("codes", "bitmask", "scale", "zero", "theta", "theta_m", "theta_v", "resu_settings")


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint or mask file holds, tensor by tensor; checksums are verified on the way.

    Args:
        path: A mask file (safetensors, npz, pt), a checkpoint of ours, any other safetensors file, or a folder of
            safetensors shards.

    Returns:
        Plain values, ready for JSON: ``path``, ``kind`` (``"masks"``, ``"checkpoint"`` or ``"safetensors"``),
        ``library`` (version that wrote it, or None), ``metadata``, ``bytes`` on disk, ``tensors`` and ``total``.

        A row of ``tensors`` has ``name, shape, dtype, kind, bytes, numel, kept, sparsity, masked``. ``kind`` is
        ``"weight"``, ``"tensor"``, ``"mask"``, ``"bitmask"``, ``"extra"`` or the part of a resurrection layer;
        ``masked`` is True where the counts come from a mask, False where they are counted from values (a kept
        weight may be 0); ``kept`` and ``sparsity`` are None where they mean nothing.

        ``total`` has ``numel, kept, sparsity`` over masked weights (over all where nothing has a mask) and ``bytes``.

    Raises:
        FileNotFoundError: If there is nothing at ``path``.
        ValueError: If it is damaged or of a kind that is not known.

    Example:
        >>> import tempfile
        >>> from resu.pruning.mask_ops import save_mask
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_mask({"w": torch.tensor([True, False])}, f"{folder}/m.npz")
        ...     describe(f"{folder}/m.npz")["tensors"][0]["sparsity"]
        0.5
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    ending = path.suffix.removeprefix(".")
    if ending not in MASK_FORMATS:
        raise ValueError(f"{path} has an ending that is not known; known: {', '.join(MASK_FORMATS)}")
    if ending != "safetensors":
        return _masks(path)
    tensors, header = read_safetensors(path)
    if MASK_HEADER in header:
        return _masks(path)
    return _checkpoint(path, tensors, header)


def _row(name: str, kind: str, tensor: Tensor, mask: SparseMask | None, nbytes: int | None = None) -> dict[str, Any]:
    """One tensor; ``kept`` from the mask, or else counted."""
    numel = mask.numel if mask is not None else tensor.numel()
    kept = None
    if mask is not None:
        kept = mask.n_active
    elif kind == "weight":
        kept = int(torch.count_nonzero(tensor))
    return {
        "name": name,
        "shape": list(mask.shape if mask is not None else tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "kind": kind,
        "numel": numel,
        "kept": kept,
        "sparsity": (numel - kept) / numel if kept is not None and numel else None,
        "bytes": tensor.numel() * tensor.element_size() if nbytes is None else nbytes,
        "masked": mask is not None,
    }


def _summary(
    path: Path, kind: str, rows: list[dict[str, Any]], library: str | None, metadata: Mapping[str, Any], size: int
) -> dict[str, Any]:
    masked = [row for row in rows if row["masked"]]
    # A checkpoint has a row for the weight and one for its mask: count each weight once.
    names = {row["name"]: row for row in masked}
    counted = list(names.values()) or [row for row in rows if row["kind"] == "weight"]
    numel, kept = sum(row["numel"] for row in counted), sum(row["kept"] for row in counted)
    return {
        "path": str(path),
        "kind": kind,
        "library": library,
        "metadata": dict(metadata),
        "bytes": size,
        "tensors": rows,
        "total": {
            "numel": numel,
            "kept": kept,
            "sparsity": (numel - kept) / numel if numel else 0.0,
            "bytes": sum(row["bytes"] for row in rows),
        },
    }


def _masks(path: Path) -> dict[str, Any]:
    masks, body = read_masks(path)
    rows = [_row(name, "mask", mask.packed, mask) for name, mask in masks.items()]
    return _summary(path, "masks", rows, body["library"], body["metadata"], path.stat().st_size)


def _checkpoint(path: Path, tensors: dict[str, Tensor], header: Mapping[str, str]) -> dict[str, Any]:
    body: dict[str, Any] = {}
    masks: dict[str, SparseMask] = {}
    if CHECKPOINT_HEADER in header:
        body = open_header(CHECKPOINT_HEADER, header, VERSION, path)
        masks = parse_checkpoint(tensors, header, path).masks  # verifies every tensor
    return _summary(
        path,
        "checkpoint" if body else "safetensors",
        _rows(dict(tensors), masks),
        body.get("library"),
        body.get("metadata", {}),
        path.stat().st_size,
    )


def _rows(tensors: dict[str, Tensor], masks: Mapping[str, SparseMask]) -> list[dict[str, Any]]:
    rows = []
    for prefix in bitmask_prefixes(tensors):
        parts = take_bitmask(tensors, prefix)
        name = prefix + "weight"
        _, mask = unpack_bitmask(parts, name)
        nbytes = sum(part.numel() * part.element_size() for part in parts.values())
        rows.append(_row(name, "bitmask", parts["compressed"], mask, nbytes))
    for name, tensor in tensors.items():
        if name.startswith(MASK_PREFIX):
            weight = name.removeprefix(MASK_PREFIX)
            rows.append(_row(weight, "mask", tensor, masks.get(weight)))
        elif name.startswith(EXTRA_PREFIX):
            rows.append(_row(name, "extra", tensor, None))
        else:
            rows.append(_layer_row(name, tensor, tensors, masks))
    return rows


def _layer_row(
    name: str, tensor: Tensor, tensors: Mapping[str, Tensor], masks: Mapping[str, SparseMask]
) -> dict[str, Any]:
    prefix, _, part = name.rpartition(".")
    prefix = f"{prefix}." if prefix else ""
    in_mode = f"{prefix}resu_settings" in tensors
    weight = tensors.get(f"{prefix}weight")
    mask = masks.get(name)
    if in_mode and part == "weight" and (bits := tensors.get(f"{prefix}bitmask")) is not None:
        mask = SparseMask.from_packed(bits, tensor.shape)
    kind = part if in_mode and part in _MODES else "weight" if tensor.ndim > 1 else "tensor"
    row = _row(name, kind, tensor, mask)
    if in_mode and part == "bitmask" and weight is None and (theta := tensors.get(f"{prefix}theta")) is not None:
        kept = sum(int(((tensor >> bit) & 1).sum()) for bit in range(8))
        numel = kept + theta.numel()
        sparsity = (numel - kept) / numel if numel else None
        row |= {"numel": numel, "kept": kept, "sparsity": sparsity, "masked": True}
        row["name"] = f"{prefix}weight"
    return row


def _folder(path: Path) -> dict[str, Any]:
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        raise FileFormatError(f"the folder {path} holds no safetensors file")
    each = [describe(shard) for shard in shards]
    rows = [row for one in each for row in one["tensors"]]
    kinds = {one["kind"] for one in each}
    kind = kinds.pop() if len(kinds) == 1 else "safetensors"
    return _summary(path, kind, rows, each[0]["library"], each[0]["metadata"], sum(one["bytes"] for one in each))
