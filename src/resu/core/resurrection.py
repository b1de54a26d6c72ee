"""θ at pruned positions, for a weight of any shape: start values, Φ (scatter), Φ⁻¹ (gather), and rows of
``W_eff = M⊙W + Φ(θ)`` put together from packed codes, mask bits, scales and θ.

A weight is seen as ``[rows, columns]``, rows the first dimension; θ holds the pruned positions in row-major
order. Everything works row range by row range, so that nothing of the weight's size is ever held beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from resu.core.bits import chunk_on, unpack_bits
from resu.core.counting import positions
from resu.core.mask import SparseMask
from resu.core.quantization import offsets, unpack_codes

__all__ = [
    "PackedRows",
    "active_checksum",
    "gather_active",
    "gather_theta",
    "init_theta",
    "row_offsets",
    "scatter_theta_",
    "sigma_active",
]


def _as_rows(mask: SparseMask) -> tuple[int, int]:
    rows = mask.packed.shape[0]
    return rows, mask.numel // rows if rows else 0


def _chunks(mask: SparseMask, active: bool) -> Iterator[tuple[int, int, Tensor]]:
    """``(first, last, indices inside)`` of flat chunks; indices of active or of pruned positions."""
    rows, columns = _as_rows(mask)
    step = max(1, chunk_on(mask.packed.device) // max(columns, 1))
    for r0 in range(0, rows, step):
        r1 = min(r0 + step, rows)
        bits = unpack_bits(mask.packed[r0:r1], (r1 - r0, columns))
        yield r0 * columns, r1 * columns, positions(bits if active else bits.logical_not_())


def _gather(x: Tensor, mask: SparseMask, active: bool) -> Tensor:
    if x.shape != mask.shape:
        raise ValueError(f"mask of shape {tuple(mask.shape)} used on a tensor of shape {tuple(x.shape)}")
    flat = x.detach().reshape(-1)
    out = flat.new_empty(mask.n_active if active else mask.n_pruned)
    done = 0
    for first, last, index in _chunks(mask, active):
        torch.index_select(flat[first:last], 0, index, out=out[done : done + index.numel()])
        done += index.numel()
    return out


def gather_theta(x: Tensor, mask: SparseMask) -> Tensor:
    """Φ⁻¹: values of ``x`` at pruned positions, ``[p]``, row-major; no gradient flows.

    Example:
        >>> mask = SparseMask(torch.tensor([[True, False], [False, True]]))
        >>> gather_theta(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), mask)
        tensor([2., 3.])
    """
    return _gather(x, mask, active=False)


def gather_active(x: Tensor, mask: SparseMask) -> Tensor:
    """Values of ``x`` at active positions, row-major; no gradient flows."""
    return _gather(x, mask, active=True)


@torch.no_grad()
def scatter_theta_(x: Tensor, theta: Tensor, mask: SparseMask) -> Tensor:
    """Φ: write ``theta`` (``[p]``) into ``x`` at pruned positions, in place; returns ``x``."""
    if x.shape != mask.shape or theta.shape != (mask.n_pruned,):
        raise ValueError(
            f"theta of shape {tuple(theta.shape)} cannot be placed by a mask of shape {tuple(mask.shape)} "
            f"with {mask.n_pruned} pruned positions into a tensor of shape {tuple(x.shape)}"
        )
    flat = x.detach().view(-1) if x.is_contiguous() else x.detach().reshape(-1)
    done = 0
    for first, last, index in _chunks(mask, active=False):
        values = theta.detach()[done : done + index.numel()].to(x.dtype)
        flat[first:last].scatter_(0, index, values)
        done += index.numel()
    if not x.is_contiguous():
        x.copy_(flat.view(x.shape))
    return x


def sigma_active(weight: Tensor, mask: SparseMask) -> float:
    """Standard deviation of the active weights (around their mean, divided by their count); 0 if there are
    none.
    """
    values = gather_active(weight, mask)
    if values.numel() == 0:
        return 0.0
    return float(values.double().std(correction=0))


def init_theta(
    mask: SparseMask,
    sigma: float,
    epsilon: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """θ ~ N(0, (ε·σ_A)²), ``[p]``.

    Raises:
        ValueError: If ``epsilon`` is negative or not finite.
    """
    if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)):
        raise TypeError(f"epsilon must be a number >= 0, got {epsilon!r}")
    if not math.isfinite(epsilon) or epsilon < 0:
        raise ValueError(f"epsilon must be a finite number >= 0, got {epsilon!r}")
    # Drawn on the generator's device, the CPU by default: equal seeds give equal θ on every device.
    where = "cpu" if generator is None else generator.device
    theta = torch.empty(mask.n_pruned, dtype=dtype, device=where).normal_(0.0, 1.0, generator=generator)
    return theta.mul_(epsilon * sigma).to(mask.device if device is None else device)


@torch.no_grad()
def active_checksum(weight: Tensor, mask: SparseMask) -> tuple[int, int]:
    """Two 64-bit sums over the bits of the active weights; any single changed bit changes both.

    The second sum weighs each position by its own odd number, so that exchanged values are seen too.
    """
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    rows, columns = _as_rows(mask)
    flat = weight.detach().contiguous().view(word).view(rows, columns)
    step = max(1, chunk_on(weight.device) // max(columns, 1))
    plain = torch.zeros((), dtype=torch.int64, device=weight.device)
    weighted = plain.clone()
    for r0 in range(0, rows, step):
        r1 = min(r0 + step, rows)
        bits = unpack_bits(mask.packed[r0:r1], (r1 - r0, columns)).view(torch.int8).neg_()
        values = (flat[r0:r1].to(torch.int64) & bits).view(-1)
        plain += values.sum()
        place = torch.arange(r0 * columns, r1 * columns, device=weight.device)
        weighted += values.mul_(place.mul_(0x5851F42D4C957F2C).add_(1)).sum()  # even · place + 1 is odd
    return int(plain), int(weighted)


def row_offsets(mask: SparseMask) -> Tensor:
    """Active positions before each row, ``[rows + 1]`` on the CPU (the last one is the total); int32 where it
    fits.
    """
    rows, columns = _as_rows(mask)
    counts = torch.zeros(rows + 1, dtype=torch.int64)
    step = max(1, chunk_on(mask.packed.device) // max(columns, 1))
    for r0 in range(0, rows, step):
        r1 = min(r0 + step, rows)
        bits = unpack_bits(mask.packed[r0:r1], (r1 - r0, columns))
        counts[r0 + 1 : r1 + 1] = bits.view(torch.uint8).sum(dim=1, dtype=torch.int64).cpu()
    sums = counts.cumsum(0)
    return sums if mask.n_active > torch.iinfo(torch.int32).max else sums.to(torch.int32)


@dataclass(frozen=True)
class PackedRows:
    """A quantized weight with holes: what rows of ``W_eff`` are put together from.

    Attributes:
        codes: Packed codes of active positions, row-major (uint8).
        bitmask: Mask bits, uint8 ``[rows, ceil(columns / 8)]``.
        scale: ``[rows]`` or ``[1]``; ``zero`` likewise.
        zero: Real zero point.
        offsets: Active positions before each row, ``[rows + 1]``, on the CPU.
        columns: Columns per row.
        bits: 4 or 8.
    """

    codes: Tensor
    bitmask: Tensor
    scale: Tensor
    zero: Tensor
    offsets: Tensor
    columns: int
    bits: int

    def tiles(self, limit: int, starts: Sequence[int] = ()) -> Iterator[tuple[int, int]]:
        """Row ranges of at most ``limit`` weights (at least one row), none across a row in ``starts``."""
        rows = self.bitmask.shape[0]
        step = max(1, limit // max(self.columns, 1))
        edges = [0, *[s for s in starts if 0 < s < rows], rows]
        for low, high in pairwise(edges):
            for r0 in range(low, high, step):
                yield r0, min(r0 + step, high)

    def assemble(
        self, theta: Tensor | None, r0: int, r1: int, out: Tensor, holes: list[tuple[int, int, Tensor]] | None = None
    ) -> Tensor:
        """Write rows ``r0:r1`` of ``W_eff`` into ``out`` (``[r1 - r0, columns]``, contiguous); returns
        ``out``.

        Values are restored in the dtype of ``scale`` and cast to that of ``out``.

        Args:
            theta: ``[p]``, any floating dtype; None: +0.0 at pruned positions.
            r0: First row.
            r1: One past the last row.
            out: Where to.
            holes: If given, ``(flat start of the chunk in out, start in theta, indices in the chunk)`` is
                appended per chunk, for :meth:`collect`.
        """
        step = max(1, chunk_on(self.bitmask.device) // max(self.columns, 1))
        direct = out.dtype == self.scale.dtype
        shift = offsets(self.scale, self.zero)
        for a in range(r0, r1, step):
            b = min(a + step, r1)
            first, last = int(self.offsets[a]), int(self.offsets[b])
            t0, t1 = a * self.columns - first, b * self.columns - last
            bits = unpack_bits(self.bitmask[a:b], (b - a, self.columns))
            if direct:
                chunk = out[a - r0 : b - r0]
            else:
                chunk = torch.empty(b - a, self.columns, dtype=self.scale.dtype, device=out.device)
            flat = chunk.view(-1)
            flat.scatter_(0, positions(bits), unpack_codes(self.codes, first, last, self.bits, chunk.dtype))
            # Holes hold whatever was there; they are overwritten below.
            one = self.scale.numel() == 1
            chunk.mul_((self.scale if one else self.scale[a:b]).view(-1, 1))
            chunk.add_((shift if one else shift[a:b]).view(-1, 1))
            if theta is None:
                if chunk.is_cpu:
                    SparseMask.from_packed(self.bitmask[a:b], chunk.shape).apply_(chunk)
                else:  # a SparseMask counts its bits, and would wait for the device
                    chunk.masked_fill_(bits.logical_not_(), 0)
            else:
                index = positions(bits.logical_not_())
                if holes is not None:
                    holes.append(((a - r0) * self.columns, t0, index))
                flat.scatter_(0, index, theta[t0:t1].to(chunk.dtype))
            if not direct:
                out[a - r0 : b - r0].copy_(chunk)
        return out

    def holes(self, r0: int, r1: int, holes: list[tuple[int, int, Tensor]]) -> None:
        """Append what :meth:`assemble` would, without assembling."""
        step = max(1, chunk_on(self.bitmask.device) // max(self.columns, 1))
        for a in range(r0, r1, step):
            b = min(a + step, r1)
            bits = unpack_bits(self.bitmask[a:b], (b - a, self.columns))
            t0 = a * self.columns - int(self.offsets[a])
            holes.append(((a - r0) * self.columns, t0, positions(bits.logical_not_())))

    @staticmethod
    def collect(tile: Tensor, holes: list[tuple[int, int, Tensor]], out: Tensor) -> None:
        """Write the values of ``tile`` at the holes of its rows into their places in ``out`` (``[p]``)."""
        flat = tile.view(-1)
        for k, (start, t0, index) in enumerate(holes):
            stop = holes[k + 1][0] if k + 1 < len(holes) else flat.numel()
            values = flat[start:stop].index_select(0, index)
            out[t0 : t0 + index.numel()] = values
