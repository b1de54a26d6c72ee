"""IDX files (the MNIST format), plain or gzipped: Fashion-MNIST and everything packed like it."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from resu.experiments.data.dataset import Images, Split, shuffled_split
from resu.experiments.data.folder import DataError, find_file, find_folder, read_bytes

__all__ = ["load_fashion_mnist", "read_idx"]

_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str | Path) -> Tensor:
    """The tensor in an IDX file: magic ``0 0 type ndim``, big-endian sizes, then the values.

    Raises:
        DataError: If the file is not IDX, or its length does not fit its header.
    """
    path = Path(path)
    content = read_bytes(path)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _DTYPES or content[3] == 0:
        raise DataError(f"{path} is not an IDX file: it starts with {content[:4].hex() or 'nothing'}")
    ndim, start = content[3], 4 + 4 * content[3]
    if len(content) < start:
        raise DataError(f"{path} is cut short: {len(content)} bytes do not hold the sizes of {ndim} dimensions")
    shape = struct.unpack(f">{ndim}I", content[4:start])
    dtype = np.dtype(_DTYPES[content[2]])
    expected = start + dtype.itemsize * math.prod(shape)
    if len(content) != expected:
        raise DataError(f"{path} has {len(content)} bytes, its header (shape {shape}) needs {expected}")
    values = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return torch.from_numpy(values.astype(dtype.newbyteorder("="), copy=True))


def _part(folder: Path, part: str) -> Split:
    def read(stem: str) -> Tensor:
        return read_idx(find_file(folder, [f"{part}-{stem}.gz", f"{part}-{stem}"]))

    images, labels = read("images-idx3-ubyte"), read("labels-idx1-ubyte")
    if images.ndim != 3 or images.dtype != torch.uint8:
        raise DataError(f"{part} images in {folder} are {images.dtype} {tuple(images.shape)}, not bytes [n, h, w]")
    if labels.ndim != 1 or len(labels) != len(images):
        raise DataError(f"{folder}: {len(images)} {part} images and labels of shape {tuple(labels.shape)}")
    if len(labels) and int(labels.max()) > 9:
        raise DataError(f"{folder}: a {part} label is {int(labels.max())}, allowed are 0..9")
    return Split(images.unsqueeze(1), labels.long())


def load_fashion_mnist(directory: str | Path | None = None) -> Images:
    """Fashion-MNIST from its four files; 10 000 of the training images are held out for choices."""
    folder = find_folder("fashion_mnist", directory)
    whole = _part(folder, "train")
    train, val = shuffled_split(whole.x, whole.y, held_out=len(whole) // 6)
    return Images("fashion-mnist", train, val, _part(folder, "t10k"), 10, mean=(0.286,), std=(0.353,))
