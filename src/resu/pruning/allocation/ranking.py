"""Allocations that rank the scores of all layers together: global, and LAMP."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resu.core.counting import check_finite, keep_count, top_k_mask
from resu.pruning.allocation.base import allocations, layer_sizes, needed_scores

__all__ = ["global_masks", "lamp_levels", "ranked_together"]

Shapes = Mapping[str, torch.Size]

_JOINED = 1 << 22  # up to here one tensor of all scores is the fastest way
_CHUNK = 1 << 22
_SAMPLE = 1 << 16


@allocations.register("global")
def global_top_k(shapes: Shapes, sparsity: float, scores: Mapping[str, Tensor] | None = None) -> dict[str, int]:
    """The exact top-k over all layers together; ties keep the earlier layer, then the lower index.

    Paper: global magnitude pruning, Blalock et al., arXiv 2003.03033. Cost: two passes over all scores. Fails:
    where scores of different layers are not comparable (``wanda`` and ``ria``, whose scale is the layer's own), and
    with ``magnitude`` at high sparsity, where it all but empties wide layers; ``"lamp"`` mends that. A layer that
    would keep nothing keeps its best weight, in place of the lowest-ranked weights elsewhere.
    """
    found = needed_scores("global", shapes, scores)
    if sum(layer_sizes(shapes).values()) <= _JOINED:
        return {name: int(torch.count_nonzero(mask)) for name, mask in global_masks(found, sparsity).items()}
    return _counts(found, sparsity)


def global_masks(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Bool masks of the exact top-k over all layers together: what ``"global"`` counts. O(n) time.

    Raises:
        ValueError: On NaN or infinite scores, or fewer kept weights than layers.
    """
    sizes = layer_sizes({name: score.shape for name, score in scores.items()})
    if sum(sizes.values()) > _JOINED:
        return {name: top_k_mask(scores[name], keep) for name, keep in _counts(scores, sparsity).items()}
    for name, score in scores.items():
        check_finite(score, f"scores of {name!r}")
    device = next(iter(scores.values())).device
    masks: dict[str, Tensor] = {}

    def count(names: list[str], keep: int) -> dict[str, int]:
        joined = torch.cat([scores[name].detach().reshape(-1).to(device) for name in names])
        parts = top_k_mask(joined, keep).split([sizes[name] for name in names])
        masks.update((name, part.view(scores[name].shape)) for name, part in zip(names, parts, strict=True))
        return {name: int(torch.count_nonzero(part)) for name, part in zip(names, parts, strict=True)}

    rescued = [name for name, one in ranked_together(sizes, sparsity, count).items() if one == 1]
    for name in rescued:
        masks[name] = top_k_mask(scores[name].detach(), 1)
    return {name: masks[name] for name in scores}


def ranked_together(
    sizes: Mapping[str, int], sparsity: float, count: Callable[[list[str], int], dict[str, int]]
) -> dict[str, int]:
    """Counts of a ranking over layers in which every layer keeps at least one weight.

    Args:
        sizes: Number of weights of each layer.
        sparsity: Fraction of all removed.
        count: ``(names, keep) -> {name: kept}``: the ranking among these layers alone.

    Raises:
        ValueError: If fewer weights are kept than there are layers.
    """
    total = keep_count(sum(sizes.values()), sparsity)
    if total < len(sizes):
        raise ValueError(
            f"sparsity {sparsity!r} keeps {total} weights, fewer than the {len(sizes)} layers that keep one each"
        )
    rescued: set[str] = set()
    while True:
        kept = count([name for name in sizes if name not in rescued], total - len(rescued))
        empty = {name for name, n in kept.items() if n == 0}
        if not empty:
            return {name: kept.get(name, 1) for name in sizes}
        rescued |= empty


def _counts(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """Counts of ``"global"`` without a tensor of all scores: a sample narrows down, then one pass in chunks."""
    for name, score in scores.items():
        check_finite(score, f"scores of {name!r}")
    dtype = _common(score.dtype for score in scores.values())

    def count(names: list[str], keep: int) -> dict[str, int]:
        low, high = _bracket([scores[name] for name in names], keep, dtype)
        tallies = [_tally(scores[name], low, high, dtype) for name in names]
        if not _holds(tallies, keep):  # an unlucky sample
            tallies = [_tally(scores[name], -math.inf, math.inf, dtype) for name in names]
        return dict(zip(names, _cut(tallies, keep), strict=True))

    return ranked_together(layer_sizes({name: s.shape for name, s in scores.items()}), sparsity, count)


def _common(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """A dtype in which all scores compare exactly, as far as there is one."""
    found = set(dtypes)
    if any(d.is_floating_point for d in found):
        small = all(d.is_floating_point and d != torch.float64 for d in found)
        return torch.float32 if small else torch.float64
    return torch.int64


def _chunks(scores: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    for chunk in scores.detach().reshape(-1).split(_CHUNK):
        yield chunk.to(dtype)


def _bracket(parts: list[Tensor], keep: int, dtype: torch.dtype) -> tuple[float, float]:
    """Two numbers between which the ``keep``-th largest very likely lies (Floyd & Rivest, CACM 18(3), 1975)."""
    n = sum(part.numel() for part in parts)
    draw = torch.randint(n, (_SAMPLE,), generator=torch.Generator().manual_seed(0)).sort().values
    ends = torch.tensor([part.numel() for part in parts]).cumsum(0)
    found, start = [], 0
    for part, end in zip(parts, ends.tolist(), strict=True):
        mine = draw[(draw >= start) & (draw < end)] - start
        found.append(part.detach().reshape(-1)[mine.to(part.device)].to("cpu", dtype))
        start = end
    sample = torch.cat(found).sort(descending=True).values
    slack = 5 * math.sqrt(_SAMPLE * keep / n * (1 - keep / n)) + 5
    first, last = math.floor(_SAMPLE * keep / n - slack), math.ceil(_SAMPLE * keep / n + slack)
    high = sample[first].item() if first >= 0 else math.inf
    low = sample[last].item() if last < _SAMPLE else -math.inf
    return low, high


@dataclass(frozen=True)
class _Tally:
    """How many scores of a layer lie above a bracket, and each number inside it, ascending, with its count."""

    above: int
    values: NDArray[np.generic]
    counts: NDArray[np.int64]


def _tally(scores: Tensor, low: float, high: float, dtype: torch.dtype) -> _Tally:
    above, inside = 0, []
    for chunk in _chunks(scores, dtype):
        upper = chunk > high
        above += int(torch.count_nonzero(upper))
        if low == high:  # one number that occurs very often
            equal = torch.count_nonzero(chunk == low).view(1)
            inside.append((chunk.new_full((1,), low), equal))
        else:
            inside.append(torch.unique(chunk[(chunk >= low) & ~upper], return_counts=True))
    values, places = torch.cat([v for v, _ in inside]).unique(return_inverse=True)
    counts = torch.zeros(len(values), dtype=torch.int64, device=values.device)
    counts.index_add_(0, places, torch.cat([c for _, c in inside]))
    return _Tally(above, values.cpu().numpy(), counts.cpu().numpy())


def _holds(tallies: list[_Tally], keep: int) -> bool:
    above = sum(one.above for one in tallies)
    return above < keep <= above + sum(int(one.counts.sum()) for one in tallies)


def _cut(tallies: list[_Tally], keep: int) -> list[int]:
    """How many each layer keeps of the ``keep`` largest; equal ones go to the earlier layer."""
    values, places = np.unique(np.concatenate([one.values for one in tallies]), return_inverse=True)
    counts = np.zeros(len(values), dtype=np.int64)
    np.add.at(counts, places, np.concatenate([one.counts for one in tallies]))
    left = keep - sum(one.above for one in tallies)
    # The largest number that, with all above it, fills what is left.
    reached = len(values) - 1 - int(np.searchsorted(counts[::-1].cumsum(), left))
    kept = [
        one.above + int(one.counts[np.searchsorted(one.values, values[reached], "right") :].sum()) for one in tallies
    ]
    left = keep - sum(kept)
    for i, one in enumerate(tallies):
        at = int(np.searchsorted(one.values, values[reached]))
        ties = int(one.counts[at]) if at < len(one.values) and one.values[at] == values[reached] else 0
        kept[i] += min(ties, left)
        left -= min(ties, left)
    return kept


@allocations.register("lamp")
def lamp(shapes: Shapes, sparsity: float, scores: Mapping[str, Tensor] | None = None) -> dict[str, int]:
    """The exact top-k over all layers of ``s² / Σ_{t ≥ s} t²``, whatever the scores s are: LAMP for any of them.

    Paper: Lee et al., arXiv 2010.07611, the LAMP score with s in place of ``|w|``. The normalisation makes layers of
    unlike scale comparable, and each layer's best score about 1, so that none is emptied. Cost: a sort of each
    layer's scores, O(n log n), float64 sums. Fails: with scores below 0, which are refused. Differs from the authors'
    code: counts are exact, and equal scores of a layer share one value (see the score ``"lamp"``). Scores that are
    LAMP's already want ``"global"``.
    """
    found = needed_scores("lamp", shapes, scores)
    levels = {name: lamp_levels(name, score) for name, score in found.items()}

    def count(names: list[str], keep: int) -> dict[str, int]:
        return dict(zip(names, _cut_levels([levels[name] for name in names], keep), strict=True))

    return ranked_together(layer_sizes(shapes), sparsity, count)


Levels = tuple[NDArray[np.float64], NDArray[np.int64]]


def lamp_levels(name: str, scores: Tensor) -> Levels:
    """The LAMP values of a layer, ascending, each once, and how many weights reach at least each."""
    check_finite(scores, f"scores of {name!r}")
    if scores.numel() and bool((scores.amin() < 0).item()):
        raise ValueError(
            f"distribution 'lamp' squares scores, and those of {name!r} go down to {scores.amin().item():g}; use "
            "'global', or scores that are not negative"
        )
    distinct, counts = _distinct(scores.reshape(-1))
    square = distinct.double().square_()
    tail = (square * counts).flip(0).cumsum_(0).flip(0)
    value = square.div_(tail.masked_fill_(tail == 0, 1))
    return value.cpu().numpy(), counts.flip(0).cumsum(0).flip(0).cpu().numpy()


def _distinct(values: Tensor) -> tuple[Tensor, Tensor]:
    """Each of the numbers (none below 0), ascending, and how often it occurs."""
    if values.dtype in (torch.float16, torch.bfloat16):  # so few of them that counting is all
        counts = torch.zeros(1 << 15, dtype=torch.int64, device=values.device)
        for chunk in values.split(_CHUNK):
            bits = chunk.add(0.0).view(torch.int16).int()  # 0.0 makes -0.0 positive
            counts += torch.bincount(bits, minlength=len(counts))
        there = counts.nonzero().view(-1)
        return there.to(torch.int16).view(values.dtype), counts[there]
    if values.device.type == "cpu":  # a sort of values alone is twice as fast as torch's, which has indices too
        ascending = torch.from_numpy(np.sort(values.numpy()))
    else:
        ascending = values.sort().values
    distinct, counts = torch.unique_consecutive(ascending, return_counts=True)
    return distinct, counts


def _cut_levels(layers: list[Levels], keep: int) -> list[int]:
    """How many each layer keeps of the ``keep`` largest, by bisection over the bits of the threshold."""

    def reaching(bits: int) -> list[int]:
        value = np.array(bits, dtype=np.int64).view(np.float64)
        places = [int(np.searchsorted(values, value)) for values, _ in layers]
        return [int(c[at]) if at < len(c) else 0 for at, (_, c) in zip(places, layers, strict=True)]

    # Numbers that are not negative are ordered as their bits are.
    low, high = 0, int(max(values[-1] for values, _ in layers).view(np.int64)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sum(reaching(middle)) >= keep else (low, middle)
    kept = reaching(low + 1)
    left = keep - sum(kept)
    for i, ties in enumerate(a - b for a, b in zip(reaching(low), kept, strict=True)):
        kept[i] += min(ties, left)
        left -= min(ties, left)
    return kept
