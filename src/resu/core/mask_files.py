"""Masks on disk: packed bits with a sealed header, as safetensors, npz or pt."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import resu
from resu.core.io import FileFormatError, open_header, replacing, seal_header, user_metadata
from resu.core.mask import SparseMask
from resu.core.shards import read_header

__all__ = [
    "MASK_FORMATS",
    "MASK_HEADER",
    "each_mask",
    "mask_entries",
    "mask_format",
    "mask_header",
    "read_masks",
    "write_masks",
]

MASK_HEADER = "resu_masks"
MASK_FORMATS = ("pt", "npz", "safetensors")
_VERSION = 1


def mask_format(path: str | os.PathLike[str], format: str | None = None) -> str:
    """``pt``, ``npz`` or ``safetensors``, as given or by the file's ending.

    Raises:
        ValueError: If it is none of these.
    """
    found = format if format is not None else Path(path).suffix.removeprefix(".")
    if found not in MASK_FORMATS:
        said = f"format {format!r}" if format is not None else f"the ending of {str(path)!r}"
        raise ValueError(f"{said} is not a mask format; known: {', '.join(MASK_FORMATS)}")
    return found


def mask_entries(masks: Mapping[str, SparseMask]) -> dict[str, Any]:
    """What a header says of each mask: shape, kept count, checksum."""
    return {
        name: {"shape": list(mask.shape), "kept": mask.n_active, "sha256": mask.checksum()}
        for name, mask in masks.items()
    }


def checked_masks(packed: Mapping[str, Tensor], entries: Mapping[str, Any], where: object) -> dict[str, SparseMask]:
    """Masks from their bits, compared with what the header says.

    Raises:
        FileFormatError: On the first difference; it names the mask.
    """
    if set(packed) != set(entries):
        odd = sorted(set(packed) ^ set(entries))
        raise FileFormatError(f"{where}: masks and header disagree about {', '.join(map(repr, odd))}")
    masks = {}
    for name, entry in entries.items():
        try:
            mask = SparseMask.from_packed(packed[name], entry["shape"])
        except ValueError as error:
            raise FileFormatError(f"{where}: mask {name!r}: {error}") from None
        if mask.n_active != entry["kept"] or mask.checksum() != entry["sha256"]:
            raise FileFormatError(f"{where}: mask {name!r} does not match its checksum: the file is damaged")
        masks[name] = mask
    return masks


def write_masks(
    masks: Mapping[str, SparseMask],
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any] | None = None,
    format: str | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write masks atomically; see :func:`resu.pruning.mask_ops.save_mask`."""
    kind = mask_format(path, format)
    header = seal_header(
        MASK_HEADER,
        {
            "version": _VERSION,
            "library": resu.__version__,
            "masks": mask_entries(masks),
            "metadata": user_metadata(metadata),
        },
    )
    packed = {name: mask.packed.cpu().contiguous() for name, mask in masks.items()}
    with replacing(path, overwrite=overwrite) as temporary:
        if kind == "safetensors":
            write_safetensors(packed, temporary, header)
        elif kind == "pt":
            with open(temporary, "wb") as file:
                torch.save({**header, "packed": packed}, file)
        else:
            # Array names are file names inside the archive; the header knows which mask each one is.
            arrays = {f"mask_{i}": bits.numpy() for i, bits in enumerate(packed.values())}
            text = json.dumps({**header, "names": list(packed)})
            with open(temporary, "wb") as file:
                np.savez(file, header=np.frombuffer(text.encode(), dtype=np.uint8), **arrays)  # type: ignore[arg-type]


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, header: Mapping[str, str]) -> None:
    """``safetensors.torch.save_file``; inside :func:`resu.core.io.replacing`, which knows the file's final name."""
    try:
        save_file(dict(tensors), path, metadata=dict(header))
    except SafetensorError as error:
        if "os error" in str(error):
            raise
        raise OSError(f"could not write {path.name}: {error}") from error


def read_masks(path: str | os.PathLike[str], format: str | None = None) -> tuple[dict[str, SparseMask], dict[str, Any]]:
    """Masks and header of a file; see :func:`resu.pruning.mask_ops.load_mask`.

    Raises:
        FileNotFoundError: If there is no such file.
        FileFormatError: If it is damaged, truncated, not a mask file, or holds a pickle with code.
    """
    kind = mask_format(path, format)
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with open(path, "rb") as file:  # what the system has to say comes out as it is
        if not file.read(1):
            raise FileFormatError(f"cannot read {path} as masks ({kind}): the file is empty")
    try:
        given, packed = _READERS[kind](path)
    except FileFormatError:
        raise
    except Exception as error:
        # Whatever a parser makes of damaged bytes, even an OSError: to the user it is one thing.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileFormatError(f"cannot read {path} as masks ({kind}): {reason}") from error
    body = open_header(MASK_HEADER, given, _VERSION, path)
    return checked_masks(packed, body["masks"], path), body


def mask_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of a safetensors mask file (``masks`` by name: shape, kept, sha256), without its masks.

    Raises:
        FileFormatError: If it is damaged or not a mask file.
    """
    return open_header(MASK_HEADER, read_header(path)[1], _VERSION, path)


def each_mask(path: str | os.PathLike[str], names: Collection[str]) -> Iterator[tuple[str, SparseMask]]:
    """These masks of a safetensors mask file, one in memory at a time, each compared with its checksum.

    Raises:
        FileFormatError: If the file is damaged or lacks one of them.
    """
    entries = mask_header(path)["masks"]
    with safe_open(path, framework="pt") as file:
        held = set(file.keys())
        for name in names:
            packed = {name: file.get_tensor(name)} if name in held else {}
            yield name, checked_masks(packed, {name: entries[name]}, path)[name]


_Parts = tuple[Mapping[str, Any], dict[str, Tensor]]


def _read_safetensors(path: str | os.PathLike[str]) -> _Parts:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _read_pt(path: str | os.PathLike[str]) -> _Parts:
    given = _plain_data(path)
    if not isinstance(given, dict) or not isinstance(given.get("packed"), dict):
        raise FileFormatError(f"{path} is not a mask file written by resu")
    packed = given["packed"]
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in packed.items()):
        raise FileFormatError(f"{path} holds something else than packed masks")
    return given, packed


def _plain_data(path: str | os.PathLike[str]) -> Any:
    """What ``torch.save`` wrote; no code in a pickle runs, and torch's advice to let it run is not passed on."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        text = str(error)
        if "GLOBAL" in text or "TorchScript" in text:
            reason = "it holds a pickle with code; refused"
        elif isinstance(error, pickle.UnpicklingError):
            reason = "it is damaged, or holds a pickle with code; refused"
        elif isinstance(error, (RuntimeError, OSError, MemoryError)):
            reason = text
        else:  # the parser's own trouble with bytes that mean nothing
            reason = "it is damaged, or not written by torch.save"
        raise ValueError(reason) from None


def _read_npz(path: str | os.PathLike[str]) -> _Parts:
    # Opened here: np.load leaves a file open that turns out to be no zip.
    with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
        if not isinstance(file, np.lib.npyio.NpzFile) or "header" not in file.files:
            raise FileFormatError(f"{path} is not a mask file written by resu")
        given = json.loads(file["header"].tobytes().decode())
        names: list[str] = given["names"]
        return given, {name: torch.from_numpy(file[f"mask_{i}"]) for i, name in enumerate(names)}


_READERS: dict[str, Any] = {"safetensors": _read_safetensors, "pt": _read_pt, "npz": _read_npz}
