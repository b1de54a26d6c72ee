"""Cuts: exact top-k masks of scores that come chunk by chunk, and how such scores are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resu.core.ranks import Ranks
from resu.core.score_keys import INFINITE, has_keys, narrow, score_keys

__all__ = ["Cut", "Reading", "Scores", "Span", "checked_keys", "comparable", "spread"]

T = TypeVar("T")
R = TypeVar("R")

Ints = NDArray[np.int64]
Span = tuple[int, int]


class Scores(Protocol):
    """Scores by layer, in reading order."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Number of scores of each layer."""

    @property
    def local(self) -> bool:
        """Whether a score depends on its own weight alone, so that any span can be scored by itself."""

    def chunks(self, name: str, span: Span | None = None) -> Iterator[Tensor]:
        """Flat scores in order; a chunk may be overwritten by the next one."""


@dataclass(frozen=True)
class Cut:
    """Which scores of a layer stay: those above a threshold, and the first of those equal to it.

    Attributes:
        key: Wide key of the threshold.
        ties: How many scores equal to the threshold stay, lowest index first.
        kept: How many stay in all.
    """

    key: int
    ties: int
    kept: int

    def masker(self) -> Callable[[Tensor], Tensor]:
        """A function from flat scores, chunk after chunk in order, to their masks."""
        left = self.ties
        levels: dict[torch.dtype, tuple[int, bool]] = {}

        def mask(scores: Tensor) -> Tensor:
            nonlocal left
            scores = comparable(scores)
            if scores.dtype not in levels:
                low = narrow(self.key, scores.dtype)
                levels[scores.dtype] = low, low == narrow(self.key, scores.dtype, up=True)
            level, reached = levels[scores.dtype]
            keys = score_keys(scores)
            kept = keys > level
            if left and reached:
                equal = np.flatnonzero(keys == level)[:left]
                kept[equal] = True
                left -= len(equal)
            return torch.from_numpy(kept)

        return mask


@dataclass(frozen=True)
class Reading:
    """How scores are read; the result does not depend on it.

    Attributes:
        workers: Threads.
        ranks: Processes; each reads its share of the layers.
        blocks: Blocks of the sample.
        block: Scores per block.
        collected: How many distinct scores may be held at once, per process.
        span: Scores per task of a thread.
        bins: Bits of the number of histogram bins.
        tick: Called with the number of scores that have been read.
    """

    workers: int = 1
    ranks: Ranks = field(default_factory=Ranks)
    blocks: int = 2048
    block: int = 1024
    collected: int = 1 << 23
    span: int = 1 << 25
    bins: int = 20
    tick: Callable[[int], None] = lambda done: None


def comparable(scores: Tensor) -> Tensor:
    """Scores in a dtype that has keys; integers become float64.

    Raises:
        ValueError: On integers that float64 does not hold exactly.
    """
    if has_keys(scores.dtype):
        return scores
    if scores.is_floating_point():
        return scores.float()
    wide = scores.double()
    if scores.numel() and float(wide.abs().max()) > 2**53:
        raise ValueError("scores hold integers above 2^53; return floating scores")
    return wide


def checked_keys(name: str, scores: Tensor) -> tuple[NDArray[np.signedinteger], torch.dtype]:
    """Keys of scores, and the dtype they are keys of.

    Raises:
        ValueError: On NaN or infinite scores; ``name`` is in it.
    """
    scores = comparable(scores)
    keys, limit = score_keys(scores), INFINITE[scores.dtype]
    if keys.size and (keys.max() >= limit or keys.min() <= -limit):
        raise ValueError(f"{name!r} holds NaN or infinite weights or scores; clean the checkpoint or exclude the layer")
    return keys, scores.dtype


def spread(function: Callable[[T], R], tasks: Sequence[T], workers: int) -> Iterator[R]:
    """Results in the order of the tasks, computed by ``workers`` threads; the first error ends it."""
    if workers < 2 or len(tasks) < 2:
        yield from map(function, tasks)
        return
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(function, task) for task in tasks]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
