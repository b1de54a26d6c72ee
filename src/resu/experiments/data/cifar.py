"""CIFAR-10 in three forms: the binary version, the Python batches, and JPEG images packed into one npz."""

from __future__ import annotations

import io
import itertools
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from resu.experiments.data.dataset import Images, Split, shuffled_split
from resu.experiments.data.folder import DataError, find_folder, read_bytes
from resu.experiments.data.pickled import parse_pickle

__all__ = ["load_cifar10", "read_cifar_binary", "read_cifar_jpeg", "read_cifar_pickle"]

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
_TRAIN = [f"data_batch_{i}" for i in range(1, 6)]


def _checked(x: Tensor, y: Tensor, path: Path) -> Split:
    if len(x) == 0:
        raise DataError(f"{path} holds no image")
    if len(x) != len(y):
        raise DataError(f"{path} holds {len(x)} images and {len(y)} labels")
    if int(y.max()) > 9 or int(y.min()) < 0:
        raise DataError(f"{path} has labels {int(y.min())}..{int(y.max())}; allowed are 0..9")
    return Split(x, y)


def read_cifar_binary(path: str | Path) -> Split:
    """A batch of the binary version (``data_batch_1.bin``): records of one label byte and 3072 pixels.

    Raises:
        DataError: If the length is no multiple of a record, or a label is not 0..9.
    """
    path = Path(path)
    content = read_bytes(path)
    if not content or len(content) % (1 + _PIXELS):
        raise DataError(f"{path} has {len(content)} bytes, not a whole number of CIFAR-10 records of {1 + _PIXELS}")
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, 1 + _PIXELS)
    return _checked(records[:, 1:].reshape(-1, 3, _SIDE, _SIDE), records[:, 0].long(), path)


def read_cifar_pickle(path: str | Path) -> Split:
    """A batch of the Python version (``data_batch_1``): a pickled dictionary, parsed and never executed.

    Raises:
        DataError: If it holds anything but plain values and arrays, or not what a batch holds.
    """
    path = Path(path)
    batch = parse_pickle(read_bytes(path), str(path))
    if not isinstance(batch, dict):
        raise DataError(f"{path} holds no dictionary, so it is no CIFAR-10 batch")
    named = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in batch.items()}
    pixels, labels = named.get("data"), named.get("labels")
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != _PIXELS:
        raise DataError(f"{path} has no array 'data' of shape [n, {_PIXELS}], so it is no CIFAR-10 batch")
    if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
        raise DataError(f"{path} has no list of integers 'labels', so it is no CIFAR-10 batch")
    if pixels.dtype != np.uint8:
        raise DataError(f"{path} has pixels of type {pixels.dtype}, expected uint8")
    x = torch.from_numpy(pixels.copy()).view(-1, 3, _SIDE, _SIDE)
    return _checked(x, torch.tensor(labels, dtype=torch.int64), path)


def read_cifar_jpeg(path: str | Path) -> Split:
    """JPEG images in one npz: a ``header`` common to all, bodies end to end at ``offsets``, ``labels``.

    Raises:
        DataError: If Pillow is missing, an array is missing, or an image cannot be decoded.
    """
    path = Path(path)
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            f"{path} holds JPEG images and Pillow is not installed: pip install 'resu-torch[data]'"
        ) from error
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            header, body = file["header"].tobytes(), file["body"].tobytes()
            offsets, labels = file["offsets"].astype(np.int64), file["labels"].astype(np.int64)
    except KeyError as error:
        raise DataError(f"{path} lacks an array that packed JPEG images have: {error}") from error
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not a readable npz file: {error}") from error
    if len(offsets) != len(labels) + 1 or offsets[0] != 0 or offsets[-1] != len(body) or (np.diff(offsets) < 0).any():
        raise DataError(f"{path}: the offsets do not fit {len(labels)} labels and {len(body)} bytes of images")
    x = np.empty((len(labels), _SIDE, _SIDE, 3), np.uint8)
    for i, (start, end) in enumerate(itertools.pairwise(offsets)):
        try:
            with Image.open(io.BytesIO(header + body[start:end]), formats=["JPEG"]) as image:
                pixels = np.asarray(image)
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{path}: image {i} cannot be decoded: {error}") from error
        if pixels.shape != x.shape[1:]:
            raise DataError(f"{path}: image {i} has shape {pixels.shape}, expected {x.shape[1:]}")
        x[i] = pixels
    return _checked(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels), path)


def load_cifar10(directory: str | Path | None = None) -> Images:
    """CIFAR-10 in whichever form its folder holds; 5000 training images are held out for choices.

    Looked for in this order: ``data_batch_*.bin`` (binary), ``data_batch_*`` (Python),
    ``cifar10_train_jpeg.npz`` (JPEG); also inside the folder the official archives unpack to.
    """
    folder = find_folder("cifar10", directory)
    for base in (folder, folder / "cifar-10-batches-bin", folder / "cifar-10-batches-py"):
        if (base / "data_batch_1.bin").is_file():
            parts = [read_cifar_binary(base / f"{name}.bin") for name in _TRAIN]
            test = read_cifar_binary(base / "test_batch.bin")
            break
        if (base / "data_batch_1").is_file():
            parts = [read_cifar_pickle(base / name) for name in _TRAIN]
            test = read_cifar_pickle(base / "test_batch")
            break
        if (base / "cifar10_train_jpeg.npz").is_file():
            parts = [read_cifar_jpeg(base / "cifar10_train_jpeg.npz")]
            test = read_cifar_jpeg(base / "cifar10_test_jpeg.npz")
            break
    else:
        raise DataError(
            f"no CIFAR-10 in {folder}: looked for data_batch_1.bin, data_batch_1 and cifar10_train_jpeg.npz"
        )
    x, y = torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts])
    train, val = shuffled_split(x, y, held_out=len(x) // 10)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return Images("cifar10", train, val, test, 10, mean=mean, std=std)
