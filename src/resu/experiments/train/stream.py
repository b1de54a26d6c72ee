"""The batches of a run from any step on: which examples they have follows from the seed and the step alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from resu.core.randomness import derived_generator
from resu.core.ranks import Ranks
from resu.experiments.data import Batch, TrainingData
from resu.experiments.data.augment import DRAWS
from resu.experiments.train.config import Config
from resu.experiments.train.typed import ConfigError

__all__ = ["stream"]

# Fine-tuning must not see the batches of training again in the same order.
_FINETUNE_SEED = 10_000

Places = tuple[Tensor, Tensor | None]


def stream(data: TrainingData, config: Config, first: int, ranks: Ranks) -> Iterator[list[Batch]]:
    """For each step from ``first`` on: this process's slice of the batch, in the parts of ``accumulate``.

    The batch of a step is the same for any number of processes and parts, and so are its crops and flips.

    Raises:
        ConfigError: If the batch does not divide.
        ValueError: If there are not that many examples.
    """
    pieces = config.accumulate * ranks.world
    if config.batch_size % pieces:
        raise ConfigError(
            f"batch_size {config.batch_size} does not divide into {pieces} pieces ({ranks.world} processes, "
            f"accumulate {config.accumulate})"
        )
    # Asked for here and not at the first batch, so that a batch that is too large is found at once.
    places = data.places(_seed(config), config.batch_size)
    batches = (
        [data.take(*piece) for piece in pieces]
        for pieces in _pieces(itertools.islice(places, first, None), config, first, ranks)
    )
    return _ahead(batches) if getattr(data, "workers", 0) else batches


def _ahead(batches: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
    """The same batches, each read while the one before it is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches)
        while True:
            batch = coming.result()
            coming = pool.submit(next, batches)
            yield batch


def _seed(config: Config) -> int:
    return config.seed + (_FINETUNE_SEED if config.regime == "finetune" else 0)


def _pieces(batches: Iterator[Tensor], config: Config, first: int, ranks: Ranks) -> Iterator[list[Places]]:
    """Where the examples of each piece lie, and the numbers that change them."""
    size = config.batch_size // (config.accumulate * ranks.world)
    for step, batch in enumerate(batches, first):
        draws: list[Tensor | None] = [None] * (config.batch_size // size)
        if config.data.augment:
            generator = derived_generator(_seed(config), "augment", step)
            draws = list(torch.rand(len(batch), DRAWS, generator=generator).split(size))
        pieces = list(zip(batch.split(size), draws, strict=True))
        yield pieces[ranks.rank * config.accumulate : (ranks.rank + 1) * config.accumulate]
