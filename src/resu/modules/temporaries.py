"""What this library's operators hold inside while they run, beside their inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resu.core.mask import CHUNK
from resu.kernels.masked_weight import tile_limit
from resu.modules.assembled import TILE

__all__ = ["temporaries"]

_LOW = (torch.float16, torch.bfloat16)


def temporaries(operator: Any, arguments: tuple[Any, ...]) -> int:
    """Bytes of tensors at most at once inside ``resu::…``, from the shapes of its arguments; 0 if it is not known.

    Working memory of NumPy is not counted (9 bytes per weight of one tile at most), nor are scales and offsets.
    """
    count = _KNOWN.get(operator.overloadpacket.__name__)
    return 0 if count is None else count(*arguments)


def _tile(rows: int, columns: int, limit: int) -> int:
    """Weights of the largest tile: whole rows, at most ``limit`` weights."""
    return min(rows, max(1, limit // max(columns, 1))) * columns


def _assembling(
    out: torch.dtype, theta: Tensor, codes: Tensor, scale: Tensor, rows: int, columns: int, bits: int
) -> int:
    """Inside ``PackedRows.assemble``, beside what it writes to."""
    chunk = _tile(rows, columns, CHUNK)
    active = chunk * codes.numel() * 8 // bits // max(rows * columns, 1)
    wide = scale.element_size()
    unpacked = active * wide + (active * 2 if bits == 4 else 0)  # values, and bytes as integers to look them up with
    holes = 0 if theta.dtype == scale.dtype else (chunk - active) * wide
    return (0 if out == scale.dtype else chunk * wide) + max(unpacked, holes)


def _forward(x: Tensor, theta: Tensor, bias: Tensor | None, *packed: Any) -> int:
    codes, bitmask, scale, _, _, columns, bits = packed[:7]
    rows = bitmask.shape[0]
    inside = _assembling(x.dtype, theta, codes, scale, rows, columns, bits)
    return _tile(rows, columns, TILE) * x.element_size() + inside


def _backward(grad: Tensor, x: Tensor, theta: Tensor, *rest: Any) -> int:
    (need_x, _), size = rest[-1], _forward(x, theta, None, *rest)
    if need_x and x.dtype in _LOW:
        # The wide sum; the product of a tile is of the size of the output, which is made only after it.
        size += x.numel() * 4
    return size


def _lora(
    x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, bitmask: Tensor, columns: int, *rest: Any
) -> int:
    weight, codes, scale, _, _, bits = rest[:6]
    rows = bitmask.shape[0]
    tile = _tile(rows, columns, tile_limit(bitmask.device))
    source = scale if weight is None else weight
    wide, low = (8 if source.dtype == torch.float64 else 4), x.dtype in _LOW
    factors = 0 if left.element_size() == wide else (left.numel() + right.numel()) * wide
    base = tile * wide if weight is None or low else 0
    inside = _assembling(source.dtype, source, codes, scale, rows, columns, bits) if weight is None else 0
    delta = tile * wide if right.numel() else 0
    return factors + base + max(inside, delta + (tile * x.element_size() if low else 0))


def _lora_backward(grad: Tensor, x: Tensor, left: Tensor, right: Tensor, *rest: Any) -> int:
    bitmask, columns, weight, codes, scale, zero, offsets, bits = rest[:8]
    forward = _lora(x, left, right, None, bitmask, columns, weight, codes, scale, zero, offsets, bits)
    tile, low = _tile(bitmask.shape[0], columns, tile_limit(bitmask.device)), x.dtype in _LOW
    kept = tile * x.element_size()  # the tile that the gradient of x was made with, while that of the factors is
    gradient = tile * (4 + x.element_size() if low else x.element_size())
    return max(forward, kept + gradient) + (x.numel() * 4 if low and rest[-1][0] else 0)


_KNOWN: dict[str, Callable[..., int]] = {
    "assembled_linear": _forward,
    "assembled_linear_backward": _backward,
    "assembled_conv2d": _forward,
    "assembled_conv2d_backward": _backward,
    "masked_lora_linear": _lora,
    "masked_lora_linear_backward": _lora_backward,
    "masked_lora_conv2d": _lora,
    "masked_lora_conv2d_backward": _lora_backward,
}
