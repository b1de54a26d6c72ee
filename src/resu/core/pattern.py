"""Patterns: which positions of a weight compete with each other, and what a legal mask looks like.

A pattern says nothing of how good a weight is (scores) or how many a layer may keep (allocation). Scores
of any shape are seen as ``[out, in…]``: the first dimension is the output.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from resu.core.counting import check_finite, check_sparsity, keep_count, top_k_mask, top_k_rows
from resu.core.registry import Registry

__all__ = ["NM", "Block", "Channel", "Pattern", "Unstructured", "get_pattern", "patterns"]

patterns: Registry[type[Pattern]] = Registry("pattern")


class Pattern(ABC):
    """Which positions compete. Subclasses are frozen dataclasses without other state."""

    @abstractmethod
    def select(self, scores: Tensor, keep: int) -> Tensor:
        """Mask that keeps (about) ``keep`` positions by score; see :meth:`reachable` for what is exact."""

    @abstractmethod
    def reachable(self, shape: Sequence[int], keep: int) -> int:
        """The number of kept positions that :meth:`select` gives for ``keep`` on this shape."""

    def __str__(self) -> str:
        """What :func:`get_pattern` reads, such as ``"2:4"``; a pattern without such a form is shown as it is made."""
        return repr(self)

    @abstractmethod
    def violations(self, mask: Tensor) -> int:
        """How many units (rows, groups, blocks, channels) of ``mask`` break the pattern."""

    def keep_for(self, shape: Sequence[int], sparsity: float) -> int:
        """The exact count of kept positions at ``sparsity``."""
        return self.reachable(shape, keep_count(math.prod(shape), sparsity))

    def mask(self, scores: Tensor, sparsity: float) -> Tensor:
        """The legal mask at ``sparsity`` that keeps the highest scores.

        Args:
            scores: ``[out, in]`` or ``[out, in, kh, kw]`` (any shape for tensor scope); higher = keep.
            sparsity: In [0, 1).

        Returns:
            Bool tensor of the shape of ``scores``; counts are exact, ties keep the lower index.

        Raises:
            ValueError: On NaN or infinite scores, an empty tensor, or a sparsity the pattern cannot have.
        """
        check_sparsity(sparsity)
        check_finite(scores, "scores")
        return self.select(scores, self.keep_for(scores.shape, sparsity))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1) if x.ndim > 1 else x.reshape(1, -1)


def _rows_of(shape: Sequence[int]) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


@patterns.register("unstructured")
@dataclass(frozen=True)
class Unstructured(Pattern):
    """Single weights compete over the whole tensor, or within each output row.

    Args:
        scope: ``"tensor"`` or ``"row"``. Under row scope every row keeps the same count,
            ``in - floor(in * sparsity)`` (constant fan-in).

    Example:
        >>> Unstructured("row").mask(torch.tensor([[1.0, 2.0], [9.0, 8.0]]), 0.5)
        tensor([[False,  True],
                [ True, False]])
    """

    scope: str = "tensor"

    def __post_init__(self) -> None:
        if self.scope not in ("tensor", "row"):
            raise ValueError(f"scope must be 'tensor' or 'row', got {self.scope!r}")

    def __str__(self) -> str:
        return self.scope

    def keep_for(self, shape: Sequence[int], sparsity: float) -> int:
        """Exact count; under row scope the floor is taken per row."""
        if self.scope == "row":
            rows, n = _rows_of(shape)
            return rows * keep_count(n, sparsity)
        return keep_count(math.prod(shape), sparsity)

    def reachable(self, shape: Sequence[int], keep: int) -> int:
        """Every count can be reached."""
        return keep

    def select(self, scores: Tensor, keep: int) -> Tensor:
        """Exactly ``keep`` positions; under row scope rows differ by at most one, earlier rows first."""
        if self.scope == "tensor":
            return top_k_mask(scores, keep)
        rows = _rows(scores)
        each, extra = divmod(keep, rows.shape[0])
        counts = torch.full((rows.shape[0],), each, dtype=torch.int64)
        counts[:extra] += 1
        return top_k_rows(rows, counts).view(scores.shape)

    def violations(self, mask: Tensor) -> int:
        """Rows whose count differs by more than one from the mean (row scope); 0 for tensor scope."""
        if self.scope == "tensor":
            return 0
        counts = _rows(mask).sum(dim=1)
        each = int(counts.sum()) // max(len(counts), 1)
        return int(((counts < each) | (counts > each + 1)).sum())


@patterns.register("nm")
@dataclass(frozen=True)
class NM(Pattern):
    """``n`` kept of every ``m`` consecutive input columns (input channels for a convolution).

    The last group may be shorter; it keeps at most ``n``.

    Args:
        n: Kept per group.
        m: Group size.

    Example:
        >>> NM(1, 2).mask(torch.tensor([[1.0, 2.0, 4.0, 3.0]]), 0.5)
        tensor([[False,  True,  True, False]])
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise ValueError(f"N:M keeps N of M with 1 <= N < M, got {self.n}:{self.m}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """The one sparsity this pattern has, ``1 - n/m``."""
        return 1 - self.n / self.m

    def _groups(self, x: Tensor, fill: float | bool) -> Tensor:
        """``[groups, m]`` view of the input dimension, short groups padded with ``fill``."""
        columns = x.movedim(1, -1) if x.ndim > 1 else x
        short = -columns.shape[-1] % self.m
        if short:
            columns = F.pad(columns, (0, short), value=fill)
        return columns.reshape(-1, self.m)

    def _ungroup(self, groups: Tensor, shape: Sequence[int]) -> Tensor:
        moved = [shape[0], *shape[2:], shape[1]] if len(shape) > 1 else list(shape)
        padded = groups.view(*moved[:-1], -1)[..., : moved[-1]]
        return (padded.movedim(-1, 1) if len(shape) > 1 else padded).contiguous()

    def keep_for(self, shape: Sequence[int], sparsity: float) -> int:
        """Count at the pattern's own sparsity."""
        if abs(sparsity - self.sparsity) > 1e-9:
            raise ValueError(
                f"{self.n}:{self.m} has sparsity {self.sparsity:g} and no other, got {sparsity!r}; "
                "leave the sparsity at that value or use another pattern"
            )
        return self.reachable(shape, 0)

    def reachable(self, shape: Sequence[int], keep: int) -> int:
        """The count is fixed by the shape."""
        columns = shape[1] if len(shape) > 1 else math.prod(shape)
        per_row = columns // self.m * self.n + min(columns % self.m, self.n)
        return math.prod(shape) // columns * per_row if columns else 0

    def select(self, scores: Tensor, keep: int) -> Tensor:
        """The ``n`` best of each group; ``keep`` is fixed by the pattern."""
        # -inf fills short groups: nothing real loses against it, and of equals the lower column stays.
        groups = self._groups(scores if scores.is_floating_point() else scores.double(), -math.inf)
        mask = top_k_rows(groups, self.n)
        return self._ungroup(mask, scores.shape)

    def violations(self, mask: Tensor) -> int:
        """Groups that keep more than ``n``."""
        return int((self._groups(mask, False).sum(dim=1) > self.n).sum())


def _kept_units(keep: int, units: int, numel: int) -> int:
    """How many of ``units`` equal parts of a weight ``keep`` positions fill: rounded down, at least one."""
    return min(units, max(1, keep * units // numel))


def _positions(kept: int, units: int, numel: int) -> int:
    """The count that stands for ``kept`` of ``units`` parts; :func:`_kept_units` turns it back."""
    return -(-kept * numel // units)


@patterns.register("block")
@dataclass(frozen=True)
class Block(Pattern):
    """``h`` by ``w`` blocks of ``[out, in]`` live and die together (kernel positions fold into ``in``).

    A block's score is the mean of its weights' scores, so that shorter blocks at the edges compete fairly.
    The number of blocks is exact. Where the shape does not divide into blocks, a count of positions stands
    for its share of the blocks, and how many positions that is depends on whether short blocks are among
    them.

    Args:
        h: Consecutive output rows.
        w: Consecutive input columns.

    Example:
        >>> Block(1, 2).mask(torch.tensor([[1.0, 2.0, 4.0, 3.0, 9.0]]), 0.4)
        tensor([[False, False,  True,  True,  True]])
    """

    h: int = 16
    w: int = 1

    def __post_init__(self) -> None:
        if self.h < 1 or self.w < 1:
            raise ValueError(f"a block needs h >= 1 and w >= 1, got {self.h} x {self.w}")

    def __str__(self) -> str:
        return f"block:{self.h}x{self.w}"

    def _blocks(self, x: Tensor) -> Tensor:
        """``[rows of blocks, blocks per row, h * w]``, zeros beyond the edges."""
        rows = _rows(x)
        padded = F.pad(rows, (0, -rows.shape[1] % self.w, 0, -rows.shape[0] % self.h))
        r, c = padded.shape
        return padded.view(r // self.h, self.h, c // self.w, self.w).transpose(1, 2).flatten(2)

    def _units(self, shape: Sequence[int]) -> int:
        rows, n = _rows_of(shape)
        return -(-rows // self.h) * -(-n // self.w)

    def keep_for(self, shape: Sequence[int], sparsity: float) -> int:
        """Blocks are counted: ``floor(blocks * sparsity)`` go."""
        units = self._units(shape)
        return _positions(keep_count(units, sparsity), units, math.prod(shape))

    def reachable(self, shape: Sequence[int], keep: int) -> int:
        """Whole blocks, at least one; the count :meth:`select` gives where the shape divides into blocks."""
        units, n = self._units(shape), math.prod(shape)
        return _positions(_kept_units(keep, units, n), units, n)

    def select(self, scores: Tensor, keep: int) -> Tensor:
        """The best blocks, as many as ``keep`` is a share of (rounded down, at least one)."""
        sums = self._blocks(_wide(scores)).sum(dim=2)
        sizes = self._blocks(torch.ones_like(scores, dtype=torch.uint8)).sum(dim=2)
        kept = top_k_mask(sums / sizes, _kept_units(keep, sums.numel(), scores.numel()))
        rows, n = _rows_of(scores.shape)
        whole = kept.repeat_interleave(self.h, 0).repeat_interleave(self.w, 1)
        return whole[:rows, :n].reshape(scores.shape).contiguous()

    def violations(self, mask: Tensor) -> int:
        """Blocks that are kept in part."""
        kept = self._blocks(mask.to(torch.uint8)).sum(dim=2)
        sizes = self._blocks(torch.ones_like(mask, dtype=torch.uint8)).sum(dim=2)
        return int(((kept > 0) & (kept < sizes)).sum())


@patterns.register("channel")
@dataclass(frozen=True)
class Channel(Pattern):
    """Whole slices along ``dim`` live and die together (0: output channels, 1: input channels).

    Example:
        >>> Channel(1).mask(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 0.5)
        tensor([[False,  True],
                [False,  True]])
    """

    dim: int = 0

    def __str__(self) -> str:
        return f"channel:{self.dim}"

    def _units(self, shape: Sequence[int]) -> int:
        if not -len(shape) <= self.dim < len(shape):
            raise ValueError(f"Channel(dim={self.dim}) does not exist in a weight of shape {tuple(shape)}")
        return shape[self.dim]

    def _slices(self, x: Tensor) -> Tensor:
        return x.movedim(self.dim, 0).reshape(self._units(x.shape), -1)

    def keep_for(self, shape: Sequence[int], sparsity: float) -> int:
        """Channels are counted: ``floor(channels * sparsity)`` go."""
        units = self._units(shape)
        return _positions(keep_count(units, sparsity), units, math.prod(shape))

    def reachable(self, shape: Sequence[int], keep: int) -> int:
        """Whole channels, at least one."""
        units, n = self._units(shape), math.prod(shape)
        return _positions(_kept_units(keep, units, n), units, n)

    def select(self, scores: Tensor, keep: int) -> Tensor:
        """The best channels by mean score, as many as ``keep`` fills, at least one."""
        slices = self._slices(_wide(scores))
        kept = top_k_mask(slices.mean(dim=1), _kept_units(keep, len(slices), scores.numel()))
        shape = [1] * scores.ndim
        shape[self.dim] = -1
        return kept.view(shape).expand(scores.shape).contiguous()

    def violations(self, mask: Tensor) -> int:
        """Channels that are kept in part."""
        slices = self._slices(mask)
        return int((slices.any(dim=1) & ~slices.all(dim=1)).sum())


def _wide(scores: Tensor) -> Tensor:
    """Scores in a dtype that sums well: float64 for float64 and integers, else float32."""
    narrow = scores.is_floating_point() and scores.dtype != torch.float64
    return scores.detach().to(torch.float32 if narrow else torch.float64)


_FORMS: tuple[tuple[re.Pattern[str], Callable[..., Pattern]], ...] = (
    (re.compile(r"(tensor|row)"), Unstructured),
    (re.compile(r"(\d+):(\d+)"), lambda n, m: NM(int(n), int(m))),
    (re.compile(r"block:(\d+)x(\d+)"), lambda h, w: Block(int(h), int(w))),
    (re.compile(r"channel:(-?\d+)"), lambda dim: Channel(int(dim))),
)


def get_pattern(pattern: Pattern | str | None) -> Pattern:
    """A pattern from an object, a name, ``"2:4"``, ``"block:16x1"``, ``"row"``, ``"channel:1"`` or None.

    None means ``Unstructured("tensor")``.

    Raises:
        ValueError: On an unknown name; the error lists the known ones.

    ``str(pattern)`` is the way back.

    Example:
        >>> get_pattern("2:4"), get_pattern("row"), get_pattern("block:16x1")
        (NM(n=2, m=4), Unstructured(scope='row'), Block(h=16, w=1))
        >>> str(NM(2, 4))
        '2:4'
    """
    if isinstance(pattern, Pattern):
        return pattern
    if pattern is None:
        return Unstructured()
    if not isinstance(pattern, str):
        raise TypeError(f"a pattern is a Pattern, a name or None, got {pattern!r}")
    for form, made in _FORMS:
        if found := form.fullmatch(pattern):
            return made(*found.groups())
    if pattern in patterns:
        return patterns[pattern]()
    raise ValueError(
        f"unknown pattern {pattern!r}; write 'tensor', 'row', 'N:M' (N kept of M, as '2:4'), 'block:HxW' (as "
        f"'block:16x1') or 'channel:DIM' (as 'channel:0'), or a registered name: {', '.join(patterns)}"
    )
