"""Immutable data sets of tensors, and batches that depend on a seed and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

__all__ = ["Batch", "Dataset", "Images", "Split", "Text", "shuffled_split"]

Batch = tuple[Tensor, Tensor]
Part = Literal["train", "val", "test"]


class Dataset(Protocol):
    """What a recipe needs of data."""

    @property
    def name(self) -> str:
        """The data set's name."""
        ...

    def batches(self, seed: int, batch_size: int, steps: int) -> Iterator[Batch]:
        """``steps`` training batches, the same for the same seed."""
        ...

    def evaluation(self, part: Part) -> Iterator[Batch]:
        """A whole part in its order, in chunks."""
        ...


@dataclass(frozen=True, eq=False)
class Split:
    """Inputs and labels of one part of a data set."""

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"{len(self.x)} inputs do not fit {len(self.y)} labels")

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True, eq=False)
class Images:
    """Images with labels, held as bytes and scaled batch by batch: ``(x / 255 - mean) / std``.

    Attributes:
        name: Name of the data set.
        train: What is trained on.
        val: Held out of the training data; what settings are chosen by.
        test: What is reported.
        classes: Number of classes.
        mean: Mean per channel.
        std: Standard deviation per channel.
        scale: What one stands for in the stored images (255 for bytes).
    """

    name: str
    train: Split
    val: Split
    test: Split
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 255.0

    def scaled(self, x: Tensor) -> Tensor:
        """Stored images ``[batch, channels, …]`` as the floats a network sees."""
        shape = (1, -1) + (1,) * (x.ndim - 2)
        shift = torch.tensor(self.mean).view(shape) * self.scale
        factor = 1.0 / (torch.tensor(self.std).view(shape) * self.scale)
        return x.to(torch.float32).sub_(shift).mul_(factor)

    def batches(self, seed: int, batch_size: int, steps: int) -> Iterator[Batch]:
        """Random batches without replacement; each pass is a new permutation, the remainder is left out."""
        count = len(self.train)
        if not 1 <= batch_size <= count:
            raise ValueError(f"batch_size must lie in 1..{count} (the training images), got {batch_size}")
        generator = torch.Generator().manual_seed(seed)
        order, start = torch.empty(0, dtype=torch.int64), count
        for _ in range(steps):
            if start + batch_size > count:
                order, start = torch.randperm(count, generator=generator), 0
            index = order[start : start + batch_size]
            start += batch_size
            yield self.scaled(self.train.x[index]), self.train.y[index]

    def evaluation(self, part: Part, chunk: int = 500) -> Iterator[Batch]:
        """One part in its order."""
        split: Split = getattr(self, part)
        for x, y in zip(split.x.split(chunk), split.y.split(chunk), strict=True):
            yield self.scaled(x), y


@dataclass(frozen=True, eq=False)
class Text:
    """A text as symbol numbers; the network predicts the next symbol.

    Attributes:
        name: Name of the text.
        train: 1-D, bytes; likewise ``val`` and ``test``.
        symbols: The alphabet, in the order of its numbers.
        context: Length of a training window.
        evaluation_windows: How many windows, evenly spaced, stand for a part (None for all of it).
    """

    name: str
    train: Tensor
    val: Tensor
    test: Tensor
    symbols: str
    context: int = 64
    evaluation_windows: int | None = 256

    @property
    def classes(self) -> int:
        """Number of symbols."""
        return len(self.symbols)

    def _windows(self, text: Tensor, starts: Tensor) -> Batch:
        window = text[starts[:, None] + torch.arange(self.context + 1)].long()
        return window[:, :-1], window[:, 1:]

    def batches(self, seed: int, batch_size: int, steps: int) -> Iterator[Batch]:
        """Windows at random places."""
        generator = torch.Generator().manual_seed(seed)
        last = len(self.train) - self.context - 1
        if last < 0:
            raise ValueError(f"a text of {len(self.train)} symbols has no window of {self.context} + 1")
        for _ in range(steps):
            yield self._windows(self.train, torch.randint(last + 1, (batch_size,), generator=generator))

    def evaluation(self, part: Part, chunk: int = 64) -> Iterator[Batch]:
        """Windows of one part that do not overlap, in order."""
        text: Tensor = getattr(self, part)
        starts = torch.arange(0, len(text) - self.context, self.context)
        if self.evaluation_windows is not None and len(starts) > self.evaluation_windows:
            starts = starts[torch.linspace(0, len(starts) - 1, self.evaluation_windows).long()]
        for some in starts.split(chunk):
            yield self._windows(text, some)


def shuffled_split(x: Tensor, y: Tensor, held_out: int, seed: int = 1234) -> tuple[Split, Split]:
    """``(train, val)``: ``held_out`` examples drawn once for all, since files may be sorted by class."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, val = order[: len(x) - held_out], order[len(x) - held_out :]
    return Split(x[train], y[train]), Split(x[val], y[val])
