"""How a sweep over the columns of a weight chooses what stays: block by block, or group by group.

A block is a run of columns that a sweep works on together; within it lie the spans over which a mask is chosen at once.
A choice is a function ``(scores [stacks, columns, rows], first column) -> kept`` of the scores' shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from resu.core.counting import largest_remainder, top_k_mask, top_k_rows

__all__ = [
    "Blocks",
    "Choose",
    "Span",
    "as_given",
    "best_of_all",
    "best_of_groups",
    "best_of_rows",
    "channels_last",
    "of_columns",
    "of_groups",
]

Span = tuple[int, int]
Blocks = Sequence[Sequence[Span]]
Choose = Callable[[Tensor, int], Tensor]


def _check_block(block: int) -> None:
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(f"block must be a number of columns, 1 or more (128 in the paper); got {block!r}")


def of_columns(weight: Tensor, block: int) -> Blocks:
    """Blocks of ``block`` columns, the last maybe shorter, each with one choice."""
    _check_block(block)
    n = weight[0].numel()
    return [[(start, min(start + block, n))] for start in range(0, n, block)]


def of_groups(weight: Tensor, m: int, block: int) -> Blocks:
    """A choice for each group of ``m`` input channels, the last of a kernel position maybe shorter; in blocks."""
    _check_block(block)
    channels, n = weight.shape[1], weight[0].numel()
    blocks: list[list[Span]] = []
    for place in range(0, n, channels):
        for start in range(place, place + channels, m):
            stop = min(start + m, place + channels)
            if not blocks or stop - blocks[-1][0][0] > block:
                blocks.append([])
            blocks[-1].append((start, stop))
    return blocks


def channels_last(weight: Tensor) -> Tensor | None:
    """The columns of a convolution in the order in which N:M counts them: input channels fastest."""
    if weight.ndim == 2:
        return None
    index = torch.arange(weight[0].numel(), device=weight.device)
    return index.view(weight.shape[1:]).movedim(0, -1).flatten()


def _by_rows(scores: Tensor) -> Tensor:
    return scores.transpose(1, 2).flatten(0, 1)


def _by_columns(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(like.shape[0], like.shape[2], like.shape[1]).transpose(1, 2)


def _shares(blocks: Blocks, keep: int, height: int) -> dict[int, int]:
    """``{first column: kept}`` of each block of ``height`` rows, ``keep`` in total."""
    sizes = {str(spans[0][0]): (spans[-1][1] - spans[0][0]) * height for spans in blocks}
    total = sum(sizes.values())
    quotas = {start: Fraction(keep * size, total) for start, size in sizes.items()}
    return {int(start): kept for start, kept in largest_remainder(keep, quotas, sizes, minimum=0).items()}


def best_of_all(weight: Tensor, blocks: Blocks, keep: int) -> Choose:
    """``keep`` in the whole weight, each block its share, all rows together."""
    shares = _shares(blocks, keep, len(weight))
    return lambda scores, start: _by_columns(top_k_mask(_by_rows(scores), shares[start]), scores)


def best_of_rows(weight: Tensor, blocks: Blocks, keep: int) -> Choose:
    """``keep`` in the whole weight, equally many in each row (one more in the first ones), each block its share."""
    each, extra = divmod(keep, len(weight))
    fewer, more = _shares(blocks, each, 1), _shares(blocks, each + 1, 1) if extra else {}

    def choose(scores: Tensor, start: int) -> Tensor:
        counts = torch.full((len(weight),), fewer[start])
        counts[:extra] = more.get(start, 0)
        return _by_columns(top_k_rows(_by_rows(scores), counts), scores)

    return choose


def best_of_groups(n: int) -> Choose:
    """``n`` in each span of each row."""
    return lambda scores, start: _by_columns(top_k_rows(_by_rows(scores), min(n, scores.shape[1])), scores)


def as_given(mask: Tensor) -> Choose:
    """What a mask ``[stacks, rows, columns]`` says."""
    return lambda scores, start: mask[..., start : start + scores.shape[1]].transpose(1, 2)
