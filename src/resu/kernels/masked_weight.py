"""A weight with holes and what is added to it, put together tile by tile: ``W + K ⊙ (left @ right)``.

This is the one place that says what an adapted weight is. The operators multiply with these tiles and merging writes
them, so that what is trained is, to the last bit, what is merged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from resu.core.mask import SparseMask, unpack_bits
from resu.core.resurrection import PackedRows

__all__ = ["LOW", "RULES", "MaskedWeight", "tile_limit"]

# Weights per tile: 4 MB of float32. On an accelerator a tile costs a launch of each kernel, so they are larger there.
TILE = 1 << 20
LOW = (torch.float16, torch.bfloat16)
# What K is: the mask, the base weight itself (zeros stay zeros), or 1 everywhere.
RULES = ("mask", "scale", "dense")


def tile_limit(device: torch.device) -> int:
    """Weights per tile on this kind of device."""
    return TILE if device.type == "cpu" else 16 * TILE


@dataclass(frozen=True)
class MaskedWeight:
    """A frozen base weight seen as ``[rows, columns]``, dense with zeros or as packed codes of what is kept.

    Attributes:
        bitmask: Mask bits, uint8 ``[rows, ceil(columns / 8)]`` (the layout of :class:`resu.core.mask.SparseMask`).
        columns: Columns per row.
        weight: Any shape with ``rows`` first, exactly 0 at pruned positions; None where it is packed.
        codes: Packed codes of active positions, or None; with ``scale``, ``zero``, ``offsets`` and ``bits`` as in
            :class:`resu.core.resurrection.PackedRows`.
        scale: ``[rows]`` or ``[1]``.
        zero: Like ``scale``.
        offsets: ``[rows + 1]``, on the CPU.
        bits: 4 or 8.

    Example:
        >>> mask = SparseMask(torch.tensor([[True, False], [True, True]]))
        >>> base = MaskedWeight.dense(torch.tensor([[1.0, 0.0], [2.0, 3.0]]), mask.packed)
        >>> base.tile(torch.ones(2, 1), torch.ones(1, 2), 0, 2, "mask")
        tensor([[2., 0.],
                [3., 4.]])
    """

    bitmask: Tensor
    columns: int
    weight: Tensor | None = None
    codes: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    offsets: Tensor | None = None
    bits: int = 0

    @classmethod
    def dense(cls, weight: Tensor, bitmask: Tensor) -> MaskedWeight:
        """Of a weight ``[rows, …]`` that is 0 at pruned positions."""
        return cls(bitmask, weight[0].numel() if weight.shape[0] else 0, weight)

    @classmethod
    def packed(cls, rows: PackedRows) -> MaskedWeight:
        """Of codes; no dense weight exists."""
        return cls(rows.bitmask, rows.columns, None, rows.codes, rows.scale, rows.zero, rows.offsets, rows.bits)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.bitmask.shape[0]

    @property
    def wide(self) -> torch.dtype:
        """The dtype in which tiles are computed: float32, or float64 for a float64 weight."""
        source = self.scale if self.weight is None else self.weight
        assert source is not None
        return torch.float64 if source.dtype == torch.float64 else torch.float32

    def tiles(self) -> Iterator[tuple[int, int]]:
        """Row ranges of a bounded number of weights, at least one row each."""
        step = max(1, tile_limit(self.bitmask.device) // max(self.columns, 1))
        for r0 in range(0, self.rows, step):
            yield r0, min(r0 + step, self.rows)

    def base(self, r0: int, r1: int) -> Tensor:
        """Rows ``r0:r1`` of the base weight in :attr:`wide`, ``[r1 - r0, columns]``; may share its memory."""
        if self.weight is not None:
            return self.weight[r0:r1].reshape(r1 - r0, self.columns).to(self.wide)
        assert self.codes is not None
        assert self.scale is not None
        assert self.zero is not None
        assert self.offsets is not None
        packed = PackedRows(
            self.codes, self.bitmask, self.scale, self.zero, self.offsets, self.columns, self.bits
        )  # fmt: skip
        return packed.assemble(None, r0, r1, self.scale.new_empty(r1 - r0, self.columns))

    def mask_(self, tile: Tensor, r0: int, r1: int) -> Tensor:
        """Set ``tile`` (rows ``r0:r1``) to +0.0 at pruned positions, in place."""
        bits = self.bitmask[r0:r1]
        if tile.is_cpu:
            return SparseMask.from_packed(bits, tile.shape).apply_(tile)
        return tile.masked_fill_(
            unpack_bits(bits, tile.shape).logical_not_(), 0
        )  # counts nothing, so waits for nothing

    def tile(
        self, left: Tensor, right: Tensor, r0: int, r1: int, rule: str, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Rows ``r0:r1`` of ``W + K ⊙ (left @ right)``, computed in :attr:`wide` and rounded once.

        Args:
            left: ``[rows, r]`` in :attr:`wide`.
            right: ``[r, columns]`` in :attr:`wide`; nothing is added where ``r`` is 0.
            r0: First row.
            r1: One past the last row.
            rule: What K is: ``"mask"``, ``"scale"`` (the base weight) or ``"dense"`` (1 everywhere).
            dtype: Of the result: the weight's own by default (:attr:`wide` where it is packed). Another one is rounded
                to from the weight's own, as a cast of the merged weight would be.

        Returns:
            ``[r1 - r0, columns]``; to be read only.
        """
        base = self.base(r0, r1)
        if right.shape[0]:
            delta = left[r0:r1] @ right
            if rule == "scale":
                delta.mul_(base)
            elif rule == "mask":
                self.mask_(delta, r0, r1)
            base = delta.add_(base)
        own = self.wide if self.weight is None else self.weight.dtype
        return base.to(own).to(dtype or own)

    def into_(self, out: Tensor, left: Tensor, right: Tensor, rule: str) -> Tensor:
        """Write the whole of ``W + K ⊙ (left @ right)`` into ``out`` (the weight's shape, or ``[rows, columns]``).

        Pruned positions are +0.0 afterwards whatever ``left`` and ``right`` hold, unless ``rule`` is ``"dense"``.
        ``out`` may be the base weight itself.
        """
        left, right = left.to(self.wide), right.to(self.wide)
        for r0, r1 in self.tiles():
            tile = self.tile(left, right, r0, r1, rule, out.dtype)
            if rule == "scale" and right.shape[0]:  # 0 times infinity
                tile = self.mask_(tile, r0, r1)
            out[r0:r1].copy_(tile.view(out[r0:r1].shape))
        return out
