"""Products with a weight that exists only as packed codes, mask bits, scales and θ.

Rows of ``W_eff`` are put together tile by tile, multiplied and forgotten, forward and backward; the gradient
of θ is gathered from the weight gradient of one tile at a time. Nothing of the weight's size is ever
allocated.

The operators are registered with ``torch.library``, so that ``torch.compile`` sees one opaque call and does
not break the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from resu.core.mask import SparseMask
from resu.core.resurrection import PackedRows, gather_theta

__all__ = ["TILE", "assembled_conv2d", "assembled_linear", "assembled_weight"]

# Weights per tile: 4 MB of float32. Smaller tiles would make many thin products, larger ones only cost
# memory.
TILE = 1 << 20
_LOW = (torch.float16, torch.bfloat16)

_library = torch.library.Library("resu", "DEF")
_PACKED = "Tensor codes, Tensor bitmask, Tensor scale, Tensor zero, Tensor offsets, int columns, int bits"
_CONV = "int[] kernel, int[] stride, int[] padding, int[] dilation, int groups"
_library.define(f"assembled_linear(Tensor x, Tensor theta, Tensor? bias, {_PACKED}) -> Tensor")
_library.define(
    f"assembled_linear_backward(Tensor grad, Tensor x, Tensor theta, {_PACKED}, bool[2] needs) -> (Tensor, Tensor)"
)
_library.define(f"assembled_conv2d(Tensor x, Tensor theta, Tensor? bias, {_PACKED}, {_CONV}) -> Tensor")
_library.define(
    f"assembled_conv2d_backward(Tensor grad, Tensor x, Tensor theta, {_PACKED}, {_CONV}, bool[2] needs)"
    " -> (Tensor, Tensor)"
)


# -- linear ---------------------------------------------------------------------------------------------
def _linear(x: Tensor, theta: Tensor, bias: Tensor | None, *packed: Any) -> Tensor:
    rows = PackedRows(*packed)
    flat = x.reshape(-1, rows.columns)
    n = rows.bitmask.shape[0]
    y = x.new_empty(flat.shape[0], n)
    buffer: Tensor | None = None
    for r0, r1 in rows.tiles(TILE):
        if buffer is None:
            buffer = x.new_empty(r1 - r0, rows.columns)
        tile = rows.assemble(theta, r0, r1, buffer[: r1 - r0])
        if bias is None:
            torch.mm(flat, tile.t(), out=y[:, r0:r1])
        else:
            torch.addmm(bias[r0:r1], flat, tile.t(), out=y[:, r0:r1])
    return y.view(*x.shape[:-1], n)


def _linear_backward(grad: Tensor, x: Tensor, theta: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rows, (need_x, need_theta) = PackedRows(*rest[:-1]), rest[-1]
    flat = x.reshape(-1, rows.columns)
    grad = grad.reshape(-1, rows.bitmask.shape[0])
    # Many tiles add to grad_x: low precision would round at every one of them.
    wide = torch.float32 if x.dtype in _LOW else x.dtype
    grad_x = torch.zeros(flat.shape if need_x else (0,), dtype=wide, device=x.device)
    grad_theta = torch.empty(theta.shape if need_theta else (0,), dtype=theta.dtype, device=x.device)
    buffer: Tensor | None = None
    for r0, r1 in rows.tiles(TILE):
        if buffer is None:
            buffer = x.new_empty(r1 - r0, rows.columns)
        tile = buffer[: r1 - r0]
        holes: list[tuple[int, int, Tensor]] = []
        part = grad[:, r0:r1]
        if need_x:
            rows.assemble(theta, r0, r1, tile, holes)
            if wide == x.dtype:
                grad_x.addmm_(part, tile)
            else:
                grad_x += part @ tile
        if need_theta:
            if not need_x:
                rows.holes(r0, r1, holes)
            torch.mm(part.t(), flat, out=tile)
            rows.collect(tile, holes, grad_theta)
    return grad_x.to(x.dtype).view(x.shape if need_x else (0,)), grad_theta


def _linear_fake(x: Tensor, theta: Tensor, bias: Tensor | None, *packed: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed[1].shape[0])


def _backward_fake(grad: Tensor, x: Tensor, theta: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    need_x, need_theta = rest[-1]
    return x.new_empty(x.shape if need_x else (0,)), theta.new_empty(theta.shape if need_theta else (0,))


# -- convolution ----------------------------------------------------------------------------------------
def _conv_tiles(rows: PackedRows, groups: int) -> list[tuple[int, int, int, int]]:
    """``(r0, r1, first group, last group)``: tiles within one group, or of whole groups."""
    n = rows.bitmask.shape[0]
    per = n // groups
    if per * rows.columns >= TILE or groups == 1:
        edges = range(0, n, per) if groups > 1 else ()
        return [(r0, r1, r0 // per, r0 // per + 1) for r0, r1 in rows.tiles(TILE, list(edges))]
    step = max(1, TILE // (per * rows.columns))  # groups per tile
    return [(g * per, min(g + step, groups) * per, g, min(g + step, groups)) for g in range(0, groups, step)]


def _conv2d(x: Tensor, theta: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    rows = PackedRows(*rest[:7])
    kernel, stride, padding, dilation, groups = rest[7:]
    per_group = x.shape[-3] // groups
    y: Tensor | None = None
    for r0, r1, g0, g1 in _conv_tiles(rows, groups):
        tile = rows.assemble(theta, r0, r1, x.new_empty(r1 - r0, rows.columns))
        weight = tile.view(r1 - r0, per_group, *kernel)
        part = x[:, g0 * per_group : g1 * per_group]
        b = None if bias is None else bias[r0:r1]
        out = F.conv2d(part, weight, b, stride, padding, dilation, g1 - g0)
        if y is None:
            y = out.new_empty(out.shape[0], rows.bitmask.shape[0], *out.shape[2:])
        y[:, r0:r1] = out
    assert y is not None
    return y


def _conv2d_backward(grad: Tensor, x: Tensor, theta: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rows = PackedRows(*rest[:7])
    kernel, stride, padding, dilation, groups, (need_x, need_theta) = rest[7:]
    per_group = x.shape[-3] // groups
    wide = torch.float32 if x.dtype in _LOW else x.dtype
    grad_x = torch.zeros(x.shape if need_x else (0,), dtype=wide, device=x.device)
    grad_theta = torch.empty(theta.shape if need_theta else (0,), dtype=theta.dtype, device=x.device)
    for r0, r1, g0, g1 in _conv_tiles(rows, groups):
        holes: list[tuple[int, int, Tensor]] = []
        tile = rows.assemble(theta, r0, r1, x.new_empty(r1 - r0, rows.columns), holes)
        channels = slice(g0 * per_group, g1 * per_group)
        gx, gw, _ = torch.ops.aten.convolution_backward(
            grad[:, r0:r1].contiguous(),
            x[:, channels].contiguous(),
            tile.view(r1 - r0, per_group, *kernel),
            None,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            g1 - g0,
            [need_x, need_theta, False],
        )
        if need_x:
            grad_x[:, channels] += gx
        if need_theta:
            rows.collect(gw.contiguous().view(r1 - r0, -1), holes, grad_theta)
    return grad_x.to(x.dtype), grad_theta


def _conv2d_fake(x: Tensor, theta: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    kernel, stride, padding, dilation, groups = rest[7:]
    weight = x.new_empty(rest[1].shape[0], x.shape[-3] // groups, *kernel)
    return x.new_empty(F.conv2d(x, weight, None, stride, padding, dilation, groups).shape)


# -- registration ---------------------------------------------------------------------------------------
def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, theta, bias, codes, bitmask, scale, zero, row_starts, *ctx.rest = inputs
    ctx.save_for_backward(x, theta, codes, bitmask, scale, zero, row_starts)
    ctx.bias = bias is not None


def _linear_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:2])
    gx, gt = torch.ops.resu.assembled_linear_backward(grad, *ctx.saved_tensors, *ctx.rest, needs)
    gb = grad.reshape(-1, grad.shape[-1]).sum(dim=0) if ctx.bias and ctx.needs_input_grad[2] else None
    return gx if needs[0] else None, gt if needs[1] else None, gb, *([None] * 7)


def _conv2d_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:2])
    gx, gt = torch.ops.resu.assembled_conv2d_backward(grad, *ctx.saved_tensors, *ctx.rest, needs)
    gb = grad.sum(dim=(0, 2, 3)) if ctx.bias and ctx.needs_input_grad[2] else None
    return gx if needs[0] else None, gt if needs[1] else None, gb, *([None] * 12)


for _name, _function, _fake in (
    ("assembled_linear", _linear, _linear_fake),
    ("assembled_linear_backward", _linear_backward, _backward_fake),
    ("assembled_conv2d", _conv2d, _conv2d_fake),
    ("assembled_conv2d_backward", _conv2d_backward, _backward_fake),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"resu::{_name}", _fake, lib=_library)
torch.library.register_autograd("resu::assembled_linear", _linear_autograd, setup_context=_setup, lib=_library)
torch.library.register_autograd("resu::assembled_conv2d", _conv2d_autograd, setup_context=_setup, lib=_library)


def _arguments(rows: PackedRows) -> tuple[Any, ...]:
    return (
        rows.codes, rows.bitmask, rows.scale, rows.zero, rows.offsets, rows.columns, rows.bits,
    )  # fmt: skip


def _autocast(x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Input and bias in the dtype that torch's own product would use here."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return x.to(dtype), None if bias is None else bias.to(dtype)
    if x.dtype != dtype:
        raise RuntimeError(f"input has dtype {x.dtype} but the layer has {dtype}; convert one or use autocast")
    return x, bias


def assembled_linear(x: Tensor, theta: Tensor, bias: Tensor | None, rows: PackedRows, dtype: torch.dtype) -> Tensor:
    """``x @ W_eff.T + bias`` for ``x`` of shape ``[…, in]``; gradients flow to x, θ and bias.

    Args:
        x: ``[…, in]``; must have ``dtype`` unless autocast is on.
        theta: ``[p]``.
        bias: ``[out]`` or None.
        rows: The packed weight.
        dtype: The layer's dtype.
    """
    if x.shape[-1] != rows.columns:
        raise RuntimeError(f"input of shape {tuple(x.shape)} used on a layer with {rows.columns} inputs")
    x, bias = _autocast(x, bias, dtype)
    y: Tensor = torch.ops.resu.assembled_linear(x, theta, bias, *_arguments(rows))
    return y


def assembled_conv2d(
    x: Tensor,
    theta: Tensor,
    bias: Tensor | None,
    rows: PackedRows,
    dtype: torch.dtype,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolution of ``x`` (``[batch, in, h, w]`` or ``[in, h, w]``) with ``W_eff``."""
    x, bias = _autocast(x, bias, dtype)
    batch = x if x.ndim == 4 else x.unsqueeze(0)
    y: Tensor = torch.ops.resu.assembled_conv2d(
        batch,
        theta,
        bias,
        *_arguments(rows),
        list(kernel),
        list(stride),
        list(padding),
        list(dilation),
        groups,
    )
    return y if x.ndim == 4 else y.squeeze(0)


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, rows: PackedRows, mask: SparseMask, dtype: torch.dtype) -> Tensor:
        ctx.mask, ctx.dtype = mask, theta.dtype
        n = rows.bitmask.shape[0]
        out = torch.empty(n, rows.columns, dtype=dtype, device=theta.device)
        return rows.assemble(theta, 0, n, out).view(mask.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return gather_theta(grad, ctx.mask).to(ctx.dtype), None, None, None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def assembled_weight(theta: Tensor, rows: PackedRows, mask: SparseMask, dtype: torch.dtype) -> Tensor:
    """``W_eff`` as a dense tensor of the mask's shape; gradients flow to θ. For inspection and export."""
    weight: Tensor = _Weight.apply(theta, rows, mask, dtype)  # type: ignore[no-untyped-call]
    return weight
