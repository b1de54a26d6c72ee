"""Affine quantization of the active values of a weight to 4 or 8 bits, per output row or per tensor.

``w ≈ (code - zero) * scale`` with ``scale = (max - min) / (2^bits - 1)`` and ``zero = -min / scale``, both
over the **active** values only. The zero point is a real number, not an integer, so that every active value
comes back within half a step. Values are restored as ``code * scale + offset`` with
``offset = -zero * scale`` computed in float64: subtracting a large zero point from a small code first would
lose what the zero point is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from resu.core.counting import check_finite
from resu.core.mask import CHUNK

__all__ = ["Quantized", "check_bits", "dequantize", "offsets", "pack_codes", "quantize", "unpack_codes"]

SCHEMES = ("per_channel", "per_tensor")
_PAIRS: dict[tuple[torch.device, torch.dtype], Tensor] = {}


class Quantized(NamedTuple):
    """Codes and what turns them back into values.

    Attributes:
        codes: uint8, the shape of the weight; 0 at pruned positions.
        scale: ``[rows]`` (``[1]`` for ``per_tensor``), >= 0.
        zero: Real zero point, the shape of ``scale``.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


def check_bits(bits: int, scheme: str) -> None:
    """Raise ``ValueError`` unless ``bits`` is 4 or 8 and the scheme is known."""
    if isinstance(bits, bool) or bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits!r}")
    if scheme not in SCHEMES:
        raise ValueError(f"unknown quantization scheme {scheme!r}; known: {', '.join(SCHEMES)}")


def quantize(w: Tensor, bits: int = 4, scheme: str = "per_channel", mask: Tensor | None = None) -> Quantized:
    """Quantize the active values of ``w``.

    Args:
        w: Floating, any shape; seen as ``[rows, columns]`` with rows the first dimension.
        bits: 4 or 8.
        scheme: ``"per_channel"`` (one scale per row) or ``"per_tensor"``.
        mask: Bool of the shape of ``w``, True = active; None means all.

    Returns:
        :class:`Quantized`. Each active value comes back within ``scale / 2`` (up to rounding of the value
        itself); a constant row comes back exactly, a row without active values has scale and zero 0.
        Scales are float32, or float64 for a float64 weight.

    Raises:
        ValueError: On unknown bits or scheme, active values that are NaN or infinite, or a mask that does not
            fit.

    Example:
        >>> q = quantize(torch.tensor([[0.0, 1.5, 7.5]]), bits=4)
        >>> q.codes.tolist(), q.scale.tolist(), dequantize(*q).tolist()
        ([[0, 3, 15]], [0.5], [[0.0, 1.5, 7.5]])
    """
    check_bits(bits, scheme)
    if not w.is_floating_point():
        raise TypeError(f"quantize needs a floating tensor, got {w.dtype}")
    if mask is not None and mask.shape != w.shape:
        raise ValueError(f"mask of shape {tuple(mask.shape)} used on a weight of shape {tuple(w.shape)}")
    dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
    codes = torch.zeros(w.shape, dtype=torch.uint8, device=w.device)
    n = w.shape[0] if w.ndim > 1 else 1
    if w.numel() == 0:
        none = torch.zeros(n if scheme == "per_channel" else 1, dtype=dtype, device=w.device)
        return Quantized(codes, none, none.clone())
    rows, active = w.detach().reshape(n, -1), None if mask is None else mask.reshape(n, -1)
    low, high = _ranges(rows, active, dtype)
    if scheme == "per_tensor":
        low, high = low.amin(dim=0, keepdim=True), high.amax(dim=0, keepdim=True)
    empty = low > high
    low, high = low.masked_fill(empty, 0), high.masked_fill(empty, 0)
    check_finite(high - low, "the range of the active weights")
    levels = 2**bits - 1
    scale = ((high.double() - low.double()) / levels).to(dtype)
    # A range too small for a step of its own is a constant row: code 0, scale |c|, zero -sign(c) gives c
    # exactly.
    flat = (scale == 0) | (low == high)
    step = scale.double().masked_fill(flat, torch.inf).unsqueeze(1)  # x / inf = 0
    zero = torch.where(flat, -low.sign().double(), -low.double() / step.squeeze(1)).to(dtype)
    start = low.double().unsqueeze(1)
    for part in _parts(rows):
        own = slice(None) if scheme == "per_tensor" else part
        values = (rows[part].double() - start[own]).div_(step[own]).round_().clamp_(0, levels)
        if active is not None:
            values.masked_fill_(~active[part], 0)
        codes.view(n, -1)[part] = values.to(torch.uint8)
    return Quantized(codes, torch.where(flat, low.abs(), scale), zero)


def _parts(rows: Tensor) -> Iterator[slice]:
    """Row slices of a moderate number of weights, so that nothing wide of the weight's size is made."""
    step = max(1, CHUNK // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        yield slice(start, min(start + step, rows.shape[0]))


def _ranges(rows: Tensor, active: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Smallest and largest active value of each row; ``(inf, -inf)`` where there is none."""
    low = torch.empty(rows.shape[0], dtype=dtype, device=rows.device)
    high = low.clone()
    for part in _parts(rows):
        values = rows[part].to(dtype)
        if active is None:
            low[part], high[part] = values.amin(dim=1), values.amax(dim=1)
        else:
            hole = ~active[part]
            low[part] = values.masked_fill(hole, torch.inf).amin(dim=1)
            high[part] = values.masked_fill(hole, -torch.inf).amax(dim=1)
    bad = low.isnan() | high.isnan() | (low == -torch.inf) | (high == torch.inf)
    if bool(bad.any()):
        raise ValueError(
            f"the active weights hold NaN or infinite values in {int(bad.sum())} of {len(bad)} rows; "
            "clean the weights before quantizing"
        )
    return low, high


def offsets(scale: Tensor, zero: Tensor) -> Tensor:
    """The value of code 0 per row, ``-zero * scale``, rounded once."""
    return (-zero.double() * scale.double()).to(scale.dtype)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Values of ``codes`` (uint8 ``[rows, …]``, unpacked) in the dtype of ``scale``."""
    shape = (-1, *([1] * (codes.ndim - 1)))
    # Two operations, not a fused one: the result is the same bits in every tile, vector lane and tail.
    return codes.to(scale.dtype).mul_(scale.view(shape)).add_(offsets(scale, zero).view(shape))


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack 1-D codes: 4-bit two per byte (the earlier one in the low half), 8-bit as they are.

    Example:
        >>> pack_codes(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist()
        [33, 3]
    """
    check_bits(bits, SCHEMES[0])
    if codes.dtype != torch.uint8 or codes.ndim != 1:
        raise ValueError(f"expected 1-D uint8 codes, got {codes.dtype} of shape {tuple(codes.shape)}")
    if bits == 8:
        return codes.clone()
    packed = codes[0::2].clone()
    packed[: codes.numel() // 2].bitwise_or_(codes[1::2] << 4)
    return packed


def unpack_codes(packed: Tensor, start: int, stop: int, bits: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Codes number ``start`` up to ``stop``, 1-D, as ``dtype`` (uint8 or a floating dtype).

    Example:
        >>> unpack_codes(torch.tensor([33, 3], dtype=torch.uint8), 1, 3, 4).tolist()
        [2, 3]
    """
    check_bits(bits, SCHEMES[0])
    if bits == 8:
        return packed[start:stop].to(dtype)
    first = start // 2
    if stop <= start:
        return torch.empty(0, dtype=dtype, device=packed.device)
    # One look-up of two values per byte; several times cheaper than shifting, masking and interleaving.
    pairs = _pairs(packed.device, dtype).index_select(0, packed[first : (stop + 1) // 2].to(torch.int32))
    return pairs.view(dtype)[start - 2 * first : stop - 2 * first]


def _pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """For each byte its two codes as ``dtype``, seen as one element of twice the size."""
    table = _PAIRS.get((device, dtype))
    if table is None:
        byte = torch.arange(256)
        values = torch.stack([byte & 15, byte >> 4], dim=1).to(device=device, dtype=dtype)
        wide = {1: torch.int16, 2: torch.int32, 4: torch.int64, 8: torch.complex128}[dtype.itemsize]
        table = values.view(wide).view(-1)
        _PAIRS[device, dtype] = table
    return table
