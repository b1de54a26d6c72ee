"""Immutable data sets of tensors, and batches that depend on a seed and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from resu.experiments.data.augment import crop_and_flip

__all__ = ["Batch", "Dataset", "Images", "Part", "Split", "Text", "TrainingData", "shuffled_split"]

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


class TrainingData(Dataset, Protocol):
    """What ``resu train`` needs beside: which examples a batch has is apart from fetching them.

    So a run that goes on skips the choice of the batches before, which costs next to nothing, and each of several
    processes fetches its own slice of the same batch.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input: channels, height, width; or the length of a window."""
        ...

    @property
    def classes(self) -> int:
        """How many classes or symbols the network tells apart."""
        ...

    @property
    def epoch(self) -> int:
        """How many examples make one pass over the training part."""
        ...

    def places(self, seed: int, batch_size: int) -> Iterator[Tensor]:
        """Without end, for each batch: where its examples lie in the training part."""
        ...

    def take(self, places: Tensor, draws: Tensor | None = None) -> Batch:
        """The training examples at these places; with ``draws`` (uniform in [0, 1), a row for each) changed by them."""
        ...

    def evaluation(self, part: Part, chunk: int = 500, share: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """Of a whole part in chunks, every ``share[1]``-th from ``share[0]`` on."""
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

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height, width."""
        return tuple(self.train.x.shape[1:])

    @property
    def epoch(self) -> int:
        """Training images."""
        return len(self.train)

    def places(self, seed: int, batch_size: int) -> Iterator[Tensor]:
        """Random batches without replacement; each pass is a new permutation, the remainder is left out."""
        return shuffled(len(self.train), seed, batch_size)

    def take(self, places: Tensor, draws: Tensor | None = None) -> Batch:
        """Training images and labels; with ``draws`` cropped and flipped (:func:`crop_and_flip`)."""
        x = self.train.x[places]
        return self.scaled(x if draws is None else crop_and_flip(x, draws)), self.train.y[places]

    def batches(self, seed: int, batch_size: int, steps: int) -> Iterator[Batch]:
        """The first ``steps`` batches of :meth:`places`."""
        return map(self.take, itertools.islice(self.places(seed, batch_size), steps))

    def evaluation(self, part: Part, chunk: int = 500, share: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """One part in its order."""
        split: Split = getattr(self, part)
        first, every = share
        for start in range(first * chunk, len(split), every * chunk):
            yield self.scaled(split.x[start : start + chunk]), split.y[start : start + chunk]


@dataclass(frozen=True, eq=False)
class Text:
    """A text as symbol numbers; the network predicts the next symbol.

    Attributes:
        name: Name of the text.
        train: 1-D, integers; likewise ``val`` and ``test``.
        symbols: The alphabet or the vocabulary, in the order of its numbers.
        context: Length of a training window.
        evaluation_windows: How many windows, evenly spaced, stand for a part (None for all of it).
    """

    name: str
    train: Tensor
    val: Tensor
    test: Tensor
    symbols: Sequence[str]
    context: int = 64
    evaluation_windows: int | None = 256

    @property
    def classes(self) -> int:
        """Number of symbols."""
        return len(self.symbols)

    def _windows(self, text: Tensor, starts: Tensor) -> Batch:
        window = text[starts[:, None] + torch.arange(self.context + 1)].long()
        return window[:, :-1], window[:, 1:]

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of a window."""
        return (self.context,)

    @property
    def epoch(self) -> int:
        """Windows that do not overlap."""
        return max(1, (len(self.train) - 1) // self.context)

    def places(self, seed: int, batch_size: int) -> Iterator[Tensor]:
        """Random places where windows start."""
        generator = torch.Generator().manual_seed(seed)
        last = len(self.train) - self.context - 1
        if last < 0:
            raise ValueError(f"a text of {len(self.train)} symbols has no window of {self.context} + 1")
        return (torch.randint(last + 1, (batch_size,), generator=generator) for _ in itertools.repeat(None))

    def take(self, places: Tensor, draws: Tensor | None = None) -> Batch:
        """Windows of the training part, and what follows each symbol.

        Raises:
            ValueError: If there are ``draws``: a text is not augmented.
        """
        if draws is not None:
            raise ValueError("a text is not augmented; leave data.augment out")
        return self._windows(self.train, places)

    def batches(self, seed: int, batch_size: int, steps: int) -> Iterator[Batch]:
        """The first ``steps`` batches of :meth:`places`."""
        return map(self.take, itertools.islice(self.places(seed, batch_size), steps))

    def evaluation(self, part: Part, chunk: int = 64, share: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """Windows of one part that do not overlap, in order."""
        text: Tensor = getattr(self, part)
        starts = torch.arange(0, len(text) - self.context, self.context)
        if self.evaluation_windows is not None and len(starts) > self.evaluation_windows:
            starts = starts[torch.linspace(0, len(starts) - 1, self.evaluation_windows).long()]
        for some in starts.split(chunk)[share[0] :: share[1]]:
            yield self._windows(text, some)


def shuffled(count: int, seed: int, batch_size: int) -> Iterator[Tensor]:
    """Numbers of ``count`` examples in batches, without end: each pass a new permutation without its remainder.

    Raises:
        ValueError: If there are not that many examples.
    """
    if not 1 <= batch_size <= count:
        raise ValueError(f"batch_size must lie in 1..{count} (the training images), got {batch_size}")

    def endless() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from torch.randperm(count, generator=generator)[: count - count % batch_size].split(batch_size)

    return endless()


def shuffled_split(x: Tensor, y: Tensor, held_out: int, seed: int = 1234) -> tuple[Split, Split]:
    """``(train, val)``: ``held_out`` examples drawn once for all, since files may be sorted by class."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, val = order[: len(x) - held_out], order[len(x) - held_out :]
    return Split(x[train], y[train]), Split(x[val], y[val])
