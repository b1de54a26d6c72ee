"""Bits of masks, eight to a byte: rows padded to a byte, little bit order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

__all__ = ["CHUNK", "chunk_on", "count_bits", "pack_bits", "rows_of", "unpack_bits"]

# Eight 0/1 bytes b0..b7 read as one little-endian int64, times this constant, have
# b0 + 2*b1 + … + 128*b7 in their top byte: packing without a temporary per bit.
_GATHER = 0x0102040810204080
_EXPAND: dict[torch.device, Tensor] = {}
# Weights handled at a time by loops over rows: what they need beside the weight stays in the second-level
# cache.
CHUNK = 1 << 18


def chunk_on(device: torch.device, cached: int = CHUNK) -> int:
    """Values handled at a time on a kind of device: ``cached`` on the CPU, more where each part costs launches."""
    return cached if device.type == "cpu" else 16 * cached


def rows_of(shape: Sequence[int]) -> tuple[int, int]:
    """A weight of any shape seen as ``[rows, columns]``: first dimension by the rest."""
    if len(shape) == 0:
        return 1, 1
    if len(shape) == 1:
        return 1, shape[0]
    return shape[0], math.prod(shape[1:])


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a bool tensor to bits: rows padded to a byte, little bit order.

    Args:
        mask: Bool, any shape; seen as ``[rows, columns]`` with rows the first dimension.

    Returns:
        uint8 ``[rows, ceil(columns / 8)]``, equal to
        ``numpy.packbits(mask2d, axis=-1, bitorder="little")``.

    Example:
        >>> pack_bits(torch.tensor([[True, False, True]]))
        tensor([[5]], dtype=torch.uint8)
    """
    rows, columns = rows_of(mask.shape)
    bits = mask.reshape(rows, columns)
    if bits.device.type == "cpu":  # faster there
        return torch.from_numpy(np.packbits(bits.numpy(), axis=-1, bitorder="little"))
    if columns % 8:
        bits = torch.nn.functional.pad(bits, (0, 8 - columns % 8))
    if bits.numel() == 0:
        return torch.zeros(rows, bits.shape[1] // 8, dtype=torch.uint8, device=mask.device)
    bits = bits.contiguous()
    if bits.storage_offset() % 8:  # a view into a larger tensor may start anywhere
        bits = bits.clone()
    return ((bits.view(torch.int64) * _GATHER) >> 56).to(torch.uint8)  # the cast keeps the low byte


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Inverse of :func:`pack_bits`: bool tensor of ``shape``."""
    rows, columns = rows_of(shape)
    if packed.numel() == 0:
        return torch.zeros(tuple(shape), dtype=torch.bool, device=packed.device)
    if packed.device.type == "cpu" and not is_dynamo_compiling():  # faster there
        zero_or_one = np.unpackbits(packed.numpy().reshape(rows, -1), axis=-1, count=columns, bitorder="little")
        return torch.from_numpy(zero_or_one).view(torch.bool).view(tuple(shape))
    # One table look-up of eight bytes per packed byte is several times cheaper than shifting bit by bit.
    words = _expansion(packed.device).index_select(0, packed.reshape(-1).to(torch.int32))
    bits = words.view(torch.bool).view(rows, -1)
    return bits[:, :columns].contiguous().view(tuple(shape))


def count_bits(packed: Tensor) -> Tensor:
    """How many bits of each row are set: int64 ``[rows]`` from uint8 ``[rows, bytes]``; nothing is unpacked.

    Example:
        >>> count_bits(torch.tensor([[255, 1], [0, 6]], dtype=torch.uint8))
        tensor([9, 2])
    """
    if packed.device.type == "cpu" and hasattr(np, "bitwise_count") and not is_dynamo_compiling():  # NumPy 2; faster
        return torch.from_numpy(np.asarray(np.bitwise_count(packed.numpy()).sum(axis=-1, dtype=np.int64)))
    # Adds neighbouring bits, then pairs, then halves, all within their byte.
    pairs = packed - ((packed >> 1) & 0x55)
    halves = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((halves + (halves >> 4)) & 0x0F).sum(dim=-1, dtype=torch.int64)


def _expansion(device: torch.device) -> Tensor:
    table = _EXPAND.get(device)
    if table is None:
        byte = torch.arange(256, dtype=torch.int64)
        bits = (byte[:, None] >> torch.arange(8)) & 1
        table = (bits << (8 * torch.arange(8))).sum(dim=1).to(device)
        _EXPAND[device] = table
    return table
