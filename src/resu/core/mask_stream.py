"""Mask files of masks that are never in memory together: bits are written as they come, and joined at the end."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

import resu
from resu.core.io import replacing, seal_header, user_metadata, write_all
from resu.core.mask_files import MASK_HEADER, mask_format

__all__ = ["BitWriter", "aligned", "join_masks", "packed_bytes"]

VERSION = 1  # of the mask files of resu.core.mask_files


def _rows(shape: Sequence[int]) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def packed_bytes(shape: Sequence[int]) -> int:
    """Bytes of a packed mask of this shape.

    Example:
        >>> packed_bytes((3, 9))
        6
    """
    rows, columns = _rows(shape)
    return rows * -(-columns // 8)


def aligned(shape: Sequence[int], size: int, unit: int = 1) -> int:
    """About ``size`` elements per chunk, so that chunks begin at whole bytes of the packed mask and at whole units.

    Example:
        >>> aligned((4, 16), 20), aligned((4, 9), 20), aligned((4, 16), 20, unit=12)
        (16, 18, 24)
    """
    columns = _rows(shape)[1]
    step = math.lcm(unit, columns if columns % 8 else 8)
    return max(1, size // step) * step


class BitWriter:
    """Writes one mask, chunk after chunk, into a file at an offset.

    Args:
        file: Binary, open for writing.
        offset: Where the mask's first byte goes.
        shape: Of the mask.
    """

    def __init__(self, file: IO[bytes], offset: int, shape: Sequence[int]) -> None:
        self.file, self.offset, self.shape = file, offset, tuple(shape)
        self.kept, self.digest = 0, hashlib.sha256(repr(self.shape).encode())

    def add(self, mask: Tensor) -> None:
        """The next chunk: flat, bool, of a size that :func:`aligned` gives (the last one may be shorter)."""
        columns = _rows(self.shape)[1]
        bits = mask.numpy()
        packed = np.packbits(bits.reshape(-1, columns) if columns % 8 else bits, axis=-1, bitorder="little")
        self.kept += int(np.count_nonzero(bits))
        data = packed.reshape(-1).data
        self.digest.update(data)
        self.file.seek(self.offset)
        write_all(self.file, data)
        self.offset += packed.size

    def entry(self) -> dict[str, Any]:
        """What the header of a mask file says of it."""
        return {"shape": list(self.shape), "kept": self.kept, "sha256": self.digest.hexdigest()}


def join_masks(
    parts: Sequence[tuple[Path, Mapping[str, Mapping[str, Any]]]],
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """A mask file, as :func:`resu.core.mask_files.write_masks` writes it, from files of bits.

    Args:
        parts: Files of packed masks without gaps, each with the entries of its masks in order.
        path: Where; a ``.safetensors`` file.
        metadata: Plain JSON of the user's own.
        overwrite: Whether a file that is there may be replaced.
    """
    if mask_format(path) != "safetensors":
        raise ValueError(f"streamed masks are written as safetensors, got {str(path)!r}; name a .safetensors file")
    entries = {name: dict(entry) for _, masks in parts for name, entry in masks.items()}
    body = {
        "version": VERSION,
        "library": resu.__version__,
        "masks": entries,
        "metadata": user_metadata(metadata),
    }
    header: dict[str, Any] = {"__metadata__": seal_header(MASK_HEADER, body)}
    place = 0
    for name, entry in entries.items():
        rows, columns = _rows(entry["shape"])
        end = place + packed_bytes(entry["shape"])
        header[name] = {"dtype": "U8", "shape": [rows, -(-columns // 8)], "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path, overwrite=overwrite) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part, masks in parts:
            if masks:
                with open(part, "rb") as bits:
                    shutil.copyfileobj(bits, file, 1 << 20)
