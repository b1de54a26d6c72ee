"""The exact top-k of scores that are never in memory together: where to cut, and how many ties stay.

Scores are seen as integers of their order (:mod:`resu.core.score_keys`). A sample says between which two numbers the
threshold must lie; one reading counts what is above and collects what is inside; the threshold is then selected among
the collected ones, exactly. Where the sample was unlucky (or there is none, for scores that need whole tensors),
readings that make histograms of at most 2²⁰ bins narrow the bracket down, at most four of them: luck decides how
often the scores are read, never the result. The result is that of :func:`resu.pruning.allocation.global_masks`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from resu.core.randomness import derived_seed
from resu.core.score_keys import FINITE, narrow, wide_keys
from resu.pruning.cuts import Cut, Reading, Scores, Span, checked_keys, spread

__all__ = ["find_cuts"]

Ints = NDArray[np.int64]
FULL = (-FINITE, FINITE)  # the keys of all finite numbers


@dataclass
class _Tally:
    """What one reading found in a layer: how many above the bracket, each number inside, the largest of all."""

    above: int = 0
    keys: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    counts: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    top: int = -FINITE

    def add(self, keys: NDArray[np.signedinteger], dtype: torch.dtype, low: int, high: int) -> None:
        """Count a chunk."""
        if not keys.size:
            return
        self.top = max(self.top, int(wide_keys(keys.max(keepdims=True), dtype)[0]))
        first, last = narrow(low, dtype, up=True), narrow(high, dtype)
        self.above += int(np.count_nonzero(keys > last))
        if first > last:
            return
        # One unsigned comparison instead of two: what is below `first` wraps around.
        words = np.dtype(f"uint{8 * keys.itemsize}")
        inside = np.flatnonzero((keys - keys.dtype.type(first)).view(words) <= words.type(last - first))
        if first == last:
            found, counts = np.array([first], dtype=keys.dtype), np.array([len(inside)])
            found, counts = found[: len(inside)], counts[: len(inside)]
        else:
            found, counts = np.unique(keys[inside], return_counts=True)
        self.merge(wide_keys(found, dtype), counts)

    def merge(self, keys: Ints, counts: Ints) -> None:
        """Take in more numbers, each with how often it occurs."""
        self.keys = np.concatenate([self.keys, keys])
        self.counts = np.concatenate([self.counts, counts])

    def settle(self) -> None:
        """Each number once, ascending."""
        self.keys, places = np.unique(self.keys, return_inverse=True)
        self.counts = np.bincount(places, self.counts, len(self.keys)).astype(np.int64)  # exact below 2^53


class _Overflow(Exception):
    """More distinct numbers lie inside a bracket than may be held."""


class _Search:
    """The search for one threshold over some layers together."""

    def __init__(self, scores: Scores, names: Sequence[str], keep: int, how: Reading) -> None:
        self.scores, self.names, self.keep, self.how = scores, list(names), keep, how
        self.mine = how.ranks.mine({name: scores.sizes[name] for name in names})
        self.tallies: dict[str, _Tally] = {}

    def tasks(self, names: Iterable[str]) -> list[tuple[str, Span | None]]:
        """What the threads do: spans of layers, or whole layers."""
        tasks: list[tuple[str, Span | None]] = []
        for name in names:
            n, step = self.scores.sizes[name], self.how.span
            spans: list[Span | None] = [(a, min(a + step, n)) for a in range(0, n, step)]
            tasks += [(name, span) for span in (spans if self.scores.local else [None])]
        return tasks

    def each(self, names: Iterable[str], low: int, high: int) -> dict[str, _Tally]:
        """One reading: what is above and inside ``[low, high]``, by layer."""
        held = 0

        def read(task: tuple[str, Span | None]) -> tuple[str, _Tally]:
            nonlocal held
            name, span = task
            tally = _Tally()
            for chunk in self.scores.chunks(name, span):
                before = len(tally.keys)
                tally.add(*checked_keys(name, chunk), low, high)
                self.how.tick(chunk.numel())
                held += len(tally.keys) - before  # not exact among threads, nor need it be
                if low < high and held > 2 * self.how.collected:
                    before = len(tally.keys)
                    tally.settle()
                    held += len(tally.keys) - before
                    if held > self.how.collected:
                        raise _Overflow
            return name, tally

        found: dict[str, _Tally] = {}
        for name, tally in spread(read, self.tasks(names), self.how.workers):
            one = found.setdefault(name, _Tally())
            one.above, one.top = one.above + tally.above, max(one.top, tally.top)
            one.merge(tally.keys, tally.counts)
        for one in found.values():
            one.settle()
        return found

    def collect(self, low: int, high: int) -> bool:
        """Fill the tallies; False where the bracket holds too many distinct numbers."""
        try:
            self.tallies, fits = self.each(self.mine, low, high), True
        except _Overflow:
            fits = False
        if int(self.how.ranks.sum(np.array([not fits], dtype=np.int64))[0]):
            self.tallies = {}  # nothing is counted, on no rank
        return bool(self.tallies) or not self.mine

    def histogram(self, names: Sequence[str], low: int, high: int) -> tuple[Ints, int]:
        """One reading: counts of equal bins of ``[low, high]``, then of what is above; and the bins' width in bits."""
        shift = max(0, (high - low).bit_length() - self.how.bins)
        size = ((high - low) >> shift) + 1

        def read(task: tuple[str, Span | None]) -> Ints:
            counts = np.zeros(size + 1, dtype=np.int64)
            for chunk in self.scores.chunks(*task):
                counts += _binned(wide_keys(*checked_keys(task[0], chunk)), None, low, high, shift, size)
                self.how.tick(chunk.numel())
            return counts

        total = np.zeros(size + 1, dtype=np.int64)
        for counts in spread(read, self.tasks(names), self.how.workers):
            total += counts
        return self.how.ranks.sum(total), shift

    def refined(self, names: Sequence[str], keep: int, bracket: Span = FULL) -> Span:
        """A bracket that surely holds the threshold and is small enough to collect."""
        low, high = bracket
        mine = [name for name in self.mine if name in set(names)]
        while True:
            counts, shift = self.histogram(mine, low, high)
            if not counts[-1] < keep <= counts.sum():  # an unlucky sample
                low, high = FULL
                continue
            low, high, inside = _bin_of(counts, keep, low, high, shift)
            if inside <= self.how.collected or low == high:
                return low, high

    def threshold(self, names: Sequence[str], keep: int) -> int | None:
        """The ``keep``-th largest among the tallies; None where it is not inside the bracket."""
        chosen = [self.tallies[name] for name in names if name in self.tallies]
        above = sum(tally.above for tally in chosen)
        keys = np.concatenate([tally.keys for tally in chosen] or [np.empty(0, np.int64)])
        counts = np.concatenate([tally.counts for tally in chosen] or [np.empty(0, np.int64)])
        above, inside = self.how.ranks.sum(np.array([above, int(counts.sum())])).tolist()
        if not above < keep <= above + inside:
            return None
        low, high = FULL
        while low < high:
            shift = max(0, (high - low).bit_length() - 16)
            size = ((high - low) >> shift) + 1
            bins = _binned(keys, counts, low, high, shift, size)
            bins[-1] += above if self.how.ranks.rank == 0 else 0
            bins = self.how.ranks.sum(bins)
            low, high, _ = _bin_of(bins, keep, low, high, shift)
        return low

    def counted(self, key: int) -> dict[str, tuple[int, int]]:
        """By layer: how many are above ``key``, and how many equal it."""
        table = np.zeros((len(self.names), 3), dtype=np.int64)
        for i, name in enumerate(self.names):
            if (tally := self.tallies.get(name)) is not None:
                first, last = np.searchsorted(tally.keys, [key, key + 1])
                table[i] = tally.above + tally.counts[last:].sum(), tally.counts[first:last].sum(), tally.top
        table = self.how.ranks.sum(table)
        self.tops = dict(zip(self.names, table[:, 2].tolist(), strict=True))
        return {name: (int(a), int(t)) for name, (a, t, _) in zip(self.names, table.tolist(), strict=True)}

    def run(self) -> dict[str, Cut]:
        """The cuts of all layers."""
        rescued: dict[str, Cut] = {}
        bracket, inside = self.sampled()
        if inside > self.how.collected:
            bracket = self.refined(self.names, self.keep, bracket)
        self.collect(*bracket)
        while True:
            names = [name for name in self.names if name not in rescued]
            keep = self.keep - len(rescued)
            key = self.threshold(names, keep)
            if key is None:
                if not self.collect(*self.refined(names, keep)):
                    raise AssertionError("a bracket that was counted holds more than was counted")
                continue
            counts = self.counted(key)
            left = keep - sum(counts[name][0] for name in names)
            cuts = {}
            for name in names:
                above, ties = counts[name]
                ties = min(ties, left)
                left -= ties
                cuts[name] = Cut(key, ties, above + ties)
            empty = [name for name in names if cuts[name].kept == 0]
            if not empty:
                return {name: rescued.get(name) or cuts[name] for name in self.names}
            rescued |= {name: Cut(self.tops[name], 1, 1) for name in empty}

    def sampled(self) -> tuple[Span, int]:
        """A bracket by a sample (all numbers where there is none), and about how many distinct ones are inside."""
        sizes = {name: self.scores.sizes[name] for name in self.names}
        total, how = sum(sizes.values()), self.how
        if total <= how.blocks * how.block // 4 or not self.scores.local:
            return FULL, total
        blocks: dict[str, list[int]] = {}
        # Reading a small share of everything is enough, and keeps what the sample takes in proportion.
        drawn = min(how.blocks, max(256, total // (64 * how.block)))
        rng = np.random.default_rng(derived_seed(0, "sample", total))
        places = ((np.arange(drawn) + rng.random(drawn)) * (total / drawn)).astype(np.int64)
        ends = np.cumsum(list(sizes.values()))
        for i, place in zip(np.searchsorted(ends, places, side="right"), places, strict=True):
            name = self.names[min(int(i), len(self.names) - 1)]
            start = int(place) - int(ends[i] - sizes[name])
            blocks.setdefault(name, []).append(max(0, min(start, sizes[name] - how.block)))

        def read(name: str) -> list[Ints]:
            parts = []
            for start in blocks[name]:
                chunks = self.scores.chunks(name, (start, min(start + how.block, sizes[name])))
                parts.append(np.concatenate([wide_keys(*checked_keys(name, chunk)).copy() for chunk in chunks]))
            return parts

        parts = [part for found in spread(read, list(blocks), how.workers) for part in found]
        ordered = np.sort(np.concatenate(parts))[::-1]
        share = self.keep / total
        middle = ordered[min(len(ordered) - 1, int(share * len(ordered)))]
        # Weights near each other are alike (rows and layers differ in size), so blocks are what varies, not single
        # weights; and as they lie evenly over everything, what counts is how much a block differs from the next.
        each = np.array([np.count_nonzero(part > middle) / len(part) for part in parts])
        apart = (float(np.mean(np.diff(each) ** 2)) / 2) ** 0.5 if len(each) > 1 else 1.0
        slack = 6 * apart / len(parts) ** 0.5 + 8 / len(ordered)
        first, last = int((share - slack) * len(ordered)), int((share + slack) * len(ordered)) + 1
        high = int(ordered[first]) if first > 0 else FINITE
        low = int(ordered[last]) if last < len(ordered) else -FINITE
        inside = ordered[max(first, 0) : last + 1]
        distinct = 1 + np.count_nonzero(np.diff(inside))  # few in bf16, however many weights there are
        return (low, high), int(total * len(inside) / len(ordered) * distinct / len(inside))


def _binned(keys: Ints, counts: Ints | None, low: int, high: int, shift: int, size: int) -> Ints:
    inside = (keys >= low) & (keys <= high)
    above = keys > high
    places = ((keys[inside] - np.int64(low)).view(np.uint64) >> np.uint64(shift)).view(np.int64)
    bins = np.bincount(places, None if counts is None else counts[inside], size).astype(np.int64)
    return np.append(bins, np.count_nonzero(above) if counts is None else counts[above].sum())


def _bin_of(counts: Ints, keep: int, low: int, high: int, shift: int) -> tuple[int, int, int]:
    """The bin that holds the ``keep``-th largest, as ``(first key, last key, count)``; the last count is of above."""
    from_top = np.cumsum(counts[::-1])
    place = len(counts) - 1 - int(np.searchsorted(from_top, keep))
    first = low + (place << shift)
    return first, min(high, first + (1 << shift) - 1), int(counts[place])


def find_cuts(scores: Scores, names: Sequence[str], keep: int, how: Reading | None = None) -> dict[str, Cut]:
    """The exact top-``keep`` over some layers together.

    Ties keep the earlier layer, then the lower index; a layer that would be empty keeps its best weight in place of the
    lowest-ranked elsewhere.

    Args:
        scores: Where scores come from.
        names: Layers that compete, in their order.
        keep: How many scores stay, at least one per layer and at most all.
        how: Threads, processes and limits; the result does not depend on it.

    Returns:
        ``{name: Cut}``; over all names, ``kept`` adds up to ``keep``.

    Raises:
        ValueError: On NaN or infinite scores (the layer is named) or an impossible ``keep``.
    """
    total = sum(scores.sizes[name] for name in names)
    if not len(names) <= keep <= total:
        raise ValueError(f"cannot keep {keep} of {total} weights in {len(names)} layers that keep one each")
    return _Search(scores, names, keep, how or Reading()).run()
