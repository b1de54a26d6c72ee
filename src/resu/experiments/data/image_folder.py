"""Photographs in class folders, as ImageNet is kept: read and cropped when a batch needs them."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resu.experiments.data.dataset import Batch, Part, shuffled
from resu.experiments.data.folder import DataError, find_folder

__all__ = ["Files", "ImageFolder", "load_image_folder", "load_imagenet"]

_ENDINGS = (".jpeg", ".jpg", ".png", ".webp", ".bmp")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What an image is cropped to for evaluation: the middle 224 of a shorter side of 256.
_MIDDLE = 224 / 256


@dataclass(frozen=True, eq=False)
class Files:
    """Image files of one part, and the number of the class of each."""

    paths: Sequence[str]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """Images in files, brought to one size.

    For evaluation, and for training without augmentation, the middle of an image is taken; with it a random part of
    between 8 % and all of its area and of a shape between 3:4 and 4:3, mirrored half of the time (Szegedy et al., arXiv
    1409.4842). A part that would reach beyond the image is cut to it, where torchvision draws again.

    Attributes:
        names: Of the classes, in the order of their numbers.
        side: Height and width of what a network sees.
        workers: Threads that read images; with any, a batch is read while the one before is computed.
    """

    name: str
    train: Files
    val: Files
    test: Files
    names: tuple[str, ...]
    side: int = 224
    workers: int = 0
    _pool: list[ThreadPoolExecutor] = field(default_factory=list, repr=False)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.names)

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height, width."""
        return (3, self.side, self.side)

    @property
    def epoch(self) -> int:
        """Training images."""
        return len(self.train)

    def places(self, seed: int, batch_size: int) -> Iterator[Tensor]:
        """Random batches without replacement; each pass is a new permutation, the remainder is left out."""
        return shuffled(len(self.train), seed, batch_size)

    def take(self, places: Tensor, draws: Tensor | None = None) -> Batch:
        """Training images and labels, their middle or, with ``draws``, a random part."""
        paths = [self.train.paths[place] for place in places.tolist()]
        return self._read(paths, None if draws is None else draws.tolist()), self.train.labels[places]

    def batches(self, seed: int, batch_size: int, steps: int) -> Iterator[Batch]:
        """The first ``steps`` batches of :meth:`places`."""
        return map(self.take, itertools.islice(self.places(seed, batch_size), steps))

    def evaluation(self, part: Part, chunk: int = 100, share: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """One part in its order."""
        files: Files = getattr(self, part)
        first, every = share
        for start in range(first * chunk, len(files), every * chunk):
            yield self._read(files.paths[start : start + chunk]), files.labels[start : start + chunk]

    def _read(self, paths: Sequence[str], draws: Sequence[Sequence[float]] | None = None) -> Tensor:
        jobs = (paths, itertools.repeat(self.side), itertools.repeat(None) if draws is None else draws)
        if self.workers:
            if not self._pool:
                self._pool.append(ThreadPoolExecutor(self.workers))  # decoding leaves Python's lock alone
            pixels = list(self._pool[0].map(_decode, *jobs))
        else:
            pixels = list(map(_decode, *jobs))
        x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(torch.float32).div_(255)
        return x.sub_(torch.tensor(_MEAN).view(1, 3, 1, 1)).div_(torch.tensor(_STD).view(1, 3, 1, 1))


def _decode(path: str, side: int, draws: Sequence[float] | None) -> np.ndarray[Any, Any]:
    """A part of an image, ``[side, side, 3]`` bytes."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} cannot be decoded: {error}") from error
    box = _middle(*image.size) if draws is None else _random_part(*image.size, draws)
    pixels = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box=box))
    return pixels[:, ::-1] if draws is not None and draws[4] < 0.5 else pixels


_Box = tuple[float, float, float, float]


def _middle(width: int, height: int) -> _Box:
    """The square in the middle, as left, upper, right, lower."""
    side = min(width, height) * _MIDDLE
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


def _random_part(width: int, height: int, draws: Sequence[float]) -> _Box:
    """A part whose area, shape and place follow from the first four of ``draws``, uniform in [0, 1)."""
    area = (0.08 + 0.92 * draws[0]) * width * height
    ratio = math.exp((2 * draws[1] - 1) * math.log(4 / 3))
    wide, high = min(float(width), math.sqrt(area * ratio)), min(float(height), math.sqrt(area / ratio))
    left, upper = draws[2] * (width - wide), draws[3] * (height - high)
    return left, upper, left + wide, upper + high


def load_image_folder(
    directory: str | Path | None = None, *, side: int = 224, workers: int = 0, held_out: float = 0.01
) -> ImageFolder:
    """Images of your own: ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``.

    What is in ``val`` is reported, and ``held_out`` of the training images are kept for choices; where there is a
    ``test`` beside them, ``val`` is for choices, ``test`` is reported, and all of ``train`` is trained on.

    Raises:
        DataError: If a folder is missing or empty, or a class of ``val`` or ``test`` is none of ``train``.
    """
    if directory is None:
        raise DataError(
            "data 'image-folder' needs data.dir: a folder that holds train and val, each with class folders"
        )
    return _load(Path(directory), Path(directory).name, side, workers, held_out)


def load_imagenet(
    directory: str | Path | None = None, *, side: int = 224, workers: int = 0, held_out: float = 0.01
) -> ImageFolder:
    """ImageNet (ILSVRC 2012) in class folders; see :func:`load_image_folder`."""
    return _load(find_folder("imagenet", directory), "imagenet", side, workers, held_out)


def _load(folder: Path, name: str, side: int, workers: int, held_out: float) -> ImageFolder:
    if side < 1 or workers < 0 or not 0 < held_out < 1:
        raise DataError(
            f"data.side must be at least 1, data.workers at least 0 and data.held_out in (0, 1); got {side}, {workers} "
            f"and {held_out}"
        )
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"images need Pillow, which is not installed: pip install 'resu-torch[data]' ({folder})"
        ) from error
    names = _classes(folder / "train")
    whole, reported = _files(folder / "train", names), _files(folder / "val", names)
    if (folder / "test").is_dir():
        return ImageFolder(name, whole, reported, _files(folder / "test", names), names, side, workers)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(1234))
    count = max(1, round(held_out * len(whole)))
    if count >= len(whole):
        raise DataError(f"{folder / 'train'} has {len(whole)} image(s): none is left when some are held out")
    train, val = (Files([whole.paths[i] for i in part], whole.labels[part]) for part in (order[count:], order[:count]))
    return ImageFolder(name, train, val, reported, names, side, workers)


def _classes(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise DataError(f"no images: {folder} is not a folder; it should hold a folder for each class")
    names = tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()))
    if not names:
        raise DataError(f"{folder} has no folders in it; each class needs one, named after it")
    return names


def _files(folder: Path, names: tuple[str, ...]) -> Files:
    """All images of a part in the order of their classes and names."""
    unknown = [name for name in _classes(folder) if name not in set(names)]
    if unknown:
        raise DataError(f"{folder} has the class {unknown[0]!r}, which is not in {folder.parent / 'train'}")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        if (folder / name).is_dir():
            there = sorted(e.path for e in os.scandir(folder / name) if e.name.lower().endswith(_ENDINGS))
            paths += there
            labels += [label] * len(there)
    if not paths:
        raise DataError(f"{folder} holds no image with one of the endings {', '.join(_ENDINGS)}")
    return Files(paths, torch.tensor(labels, dtype=torch.int64))
