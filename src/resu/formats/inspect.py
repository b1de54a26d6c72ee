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
from resu.core.shards import SINGLE, read_header
from resu.formats.bitmask import bitmask_prefixes, take_bitmask, unpack_bitmask
from resu.formats.checks import count_nonzero
from resu.formats.files import (
    CHECKPOINT_HEADER,
    EXTRA_PREFIX,
    MASK_PREFIX,
    MODE_SETTINGS,
    VERSION,
    parse_checkpoint,
    read_safetensors,
)
from resu.formats.relayout import MASK_FILE
from resu.formats.stored import Stored

__all__ = ["describe"]

_MODES = ("codes", "bitmask", "scale", "zero", "theta", "theta_m", "theta_v", "resu_settings")


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint or mask file holds, tensor by tensor; checksums of what is read are verified.

    Args:
        path: A mask file (safetensors, npz, pt), a checkpoint of ours, any other safetensors file, or a model folder,
            sharded or not, dense or in a bitmask layout; ``masks.safetensors`` in it is used.

    Returns:
        Plain values, ready for JSON: ``path``, ``kind`` (``"masks"``, ``"checkpoint"``, ``"model"`` for a folder,
        ``"safetensors"``), ``library`` (version that wrote it, or None), ``metadata``, ``bytes`` on disk, ``tensors``
        and ``total``.

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
    entries, header = read_header(path)
    if MASK_HEADER in header:
        return _masks(path)
    if CHECKPOINT_HEADER in header or any(name.endswith(MODE_SETTINGS) for name in entries):
        return _checkpoint(path, *read_safetensors(path))
    return _model(path, {}, {})


def _row(name: str, kind: str, tensor: Tensor, mask: SparseMask | None, nbytes: int | None = None) -> dict[str, Any]:
    """One tensor; ``kept`` from the mask, or else counted."""
    numel = mask.numel if mask is not None else tensor.numel()
    kept = None
    if mask is not None:
        kept = mask.n_active
    elif kind == "weight":
        kept = count_nonzero(tensor)
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
    beside = path / MASK_FILE
    single = path / SINGLE
    if single.is_file() and CHECKPOINT_HEADER in read_header(single)[1]:
        return {**describe(single), "path": str(path)}
    if not any(file.name != MASK_FILE for file in path.glob("*.safetensors")) and beside.is_file():
        return describe(beside)
    masks, body = read_masks(beside) if beside.is_file() else ({}, {})
    return _model(path, masks, body)


def _model(path: Path, masks: Mapping[str, SparseMask], body: Mapping[str, Any]) -> dict[str, Any]:
    """A model by whichever library, one weight at a time; weights that have a mask are not read."""
    stored = Stored.open(path)
    named = {stored.ties.get(name, name): mask for name, mask in masks.items()}
    rows = []
    for name in stored.names:
        mask = named.pop(name, None)
        if mask is None and name in stored.packed:
            mask = stored.read_mask(name)
        shape, dtype = stored.shape(name), stored.dtype(name)
        if mask is not None and mask.shape != shape:
            raise FileFormatError(f"{name!r} has shape {tuple(shape)}, its mask in {path} {tuple(mask.shape)}")
        like = torch.empty(shape, dtype=dtype, device="meta") if mask is not None else stored.read(name)[0]
        kind = "bitmask" if name in stored.packed else "weight" if len(shape) > 1 else "tensor"
        rows.append({**_row(name, kind, like, mask, stored.nbytes(name)), "layout": stored.layout(name)})
    rows += [_row(name, "mask", mask.packed, mask) for name, mask in named.items()]
    files = [stored.shards.folder / file for file in stored.shards.files]
    size = sum(file.stat().st_size for file in files)
    kind = "model" if path.is_dir() else "safetensors"
    return _summary(path, kind, rows, body.get("library"), body.get("metadata", {}), size)
