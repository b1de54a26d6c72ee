"""Products with a frozen dense weight whose pruned positions hold θ: ``W_eff = M⊙W + Φ(θ)``.

The weight stays as it is, for other masks and for who wants it back. Rows of ``W_eff`` are put together tile by tile,
multiplied and forgotten, forward and backward, so that no second weight is held from one to the other: what autograd
keeps is the input and θ. For several θ over one weight what each changes is added:
``W_eff = W + Σ (1 - M_k)⊙(Φ(θ_k) - W)``.

The operators are registered with ``torch.library``, as those of :mod:`resu.modules.assembled`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resu.core.bits import CHUNK, unpack_bits
from resu.core.counting import positions
from resu.core.mask import SparseMask
from resu.core.resurrection import PackedRows, gather_theta
from resu.kernels.masked_weight import LOW, tile_limit
from resu.modules.assembled import _autocast

__all__ = ["overlaid_linear", "overlaid_weight"]

Holes = list[tuple[int, int, Tensor]]  # start of a chunk in its tile, start in θ, indices in the chunk

_library = torch.library.Library("resu", "FRAGMENT")
_library.define("overlaid_linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] thetas, Tensor[] bitmasks) -> Tensor")
_library.define(
    "overlaid_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor[] thetas, Tensor[] bitmasks, bool need_x)"
    " -> (Tensor, Tensor[])"
)


def _tiles(
    weight: Tensor, thetas: Sequence[Tensor], bitmasks: Sequence[Tensor], dtype: torch.dtype
) -> Iterator[tuple[int, int, Tensor, list[Holes]]]:
    """``(r0, r1, rows r0:r1 of W_eff, holes of each θ)`` from the first row to the last; the tile is used again."""
    rows, columns = weight.shape
    limit = tile_limit(weight.device)
    # On the CPU what is looked up for a chunk stays in the cache; elsewhere fewer calls count for more.
    height, step = (max(1, size // max(columns, 1)) for size in (limit, CHUNK if weight.is_cpu else limit))
    done = [0] * len(thetas)
    buffer = weight.new_empty(min(height, rows), columns, dtype=dtype)
    for r0 in range(0, rows, height):
        r1 = min(r0 + height, rows)
        tile = buffer[: r1 - r0].copy_(weight[r0:r1])
        holes: list[Holes] = [[] for _ in thetas]
        for a in range(r0, r1, step):
            b = min(a + step, r1)
            flat = tile[a - r0 : b - r0].view(-1)
            for k, (theta, bitmask) in enumerate(zip(thetas, bitmasks, strict=True)):
                index = positions(unpack_bits(bitmask[a:b], (b - a, columns)).logical_not_())
                values = theta[done[k] : done[k] + index.numel()].to(dtype)
                if k == 0:
                    flat.scatter_(0, index, values)
                else:
                    base = weight[a:b].reshape(-1).index_select(0, index)
                    flat.index_add_(0, index, values - base)
                holes[k].append(((a - r0) * columns, done[k], index))
                done[k] += index.numel()
        yield r0, r1, tile, holes


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, thetas: Sequence[Tensor], bitmasks: Sequence[Tensor]
) -> Tensor:
    flat = x.reshape(-1, weight.shape[1])
    y = x.new_empty(flat.shape[0], weight.shape[0])
    for r0, r1, tile, _ in _tiles(weight, thetas, bitmasks, x.dtype):
        if bias is None:
            torch.mm(flat, tile.t(), out=y[:, r0:r1])
        else:
            torch.addmm(bias[r0:r1], flat, tile.t(), out=y[:, r0:r1])
    return y.view(*x.shape[:-1], weight.shape[0])


def _linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    thetas: Sequence[Tensor],
    bitmasks: Sequence[Tensor],
    need_x: bool,
) -> tuple[Tensor, list[Tensor]]:
    flat = x.reshape(-1, weight.shape[1])
    grad = grad.reshape(-1, weight.shape[0])
    # Many tiles add to grad_x: low precision would round at every one of them.
    wide = torch.float32 if x.dtype in LOW else x.dtype
    grad_x = torch.zeros(flat.shape if need_x else (0,), dtype=wide, device=x.device)
    grad_thetas = [torch.empty_like(theta) for theta in thetas]
    for r0, r1, tile, holes in _tiles(weight, thetas, bitmasks, x.dtype):
        part = grad[:, r0:r1]
        if need_x:
            if wide == x.dtype:
                grad_x.addmm_(part, tile)
            else:
                grad_x += part @ tile
        torch.mm(part.t(), flat, out=tile)  # the tile is used up: its gradient takes its place
        for out, own in zip(grad_thetas, holes, strict=True):
            PackedRows.collect(tile, own, out)
    return grad_x.to(x.dtype).view(x.shape if need_x else (0,)), grad_thetas


def _linear_fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, thetas: Sequence[Tensor], bitmasks: Sequence[Tensor], need_x: bool
) -> tuple[Tensor, list[Tensor]]:
    return x.new_empty(x.shape if need_x else (0,)), [torch.empty_like(theta) for theta in thetas]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, thetas, bitmasks = inputs
    ctx.save_for_backward(x, weight, *thetas, *bitmasks)
    ctx.bias = bias is not None


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, *both = ctx.saved_tensors
    thetas, bitmasks = both[: len(both) // 2], both[len(both) // 2 :]
    needs = ctx.needs_input_grad
    gx, gt = torch.ops.resu.overlaid_linear_backward(grad, x, weight, thetas, bitmasks, needs[0])
    gb = grad.reshape(-1, grad.shape[-1]).sum(dim=0) if ctx.bias and needs[2] else None
    return gx if needs[0] else None, None, gb, gt, [None] * len(bitmasks)


for _name, _function, _fake in (
    ("overlaid_linear", _linear, _linear_fake),
    ("overlaid_linear_backward", _linear_backward, _backward_fake),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"resu::{_name}", _fake, lib=_library)
torch.library.register_autograd("resu::overlaid_linear", _autograd, setup_context=_setup, lib=_library)


def overlaid_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, thetas: Sequence[Tensor], bitmasks: Sequence[Tensor]
) -> Tensor:
    """``x @ W_eff.T + bias``; gradients flow to x, every θ and bias, none to ``weight``.

    Args:
        x: ``[…, in]``; must have the dtype of ``weight`` unless autocast is on.
        weight: ``[out, in]``, frozen; may be a view (``W.t()`` of a weight stored inputs first).
        bias: ``[out]`` or None.
        thetas: For each mask the values at its pruned positions, ``[p]``, row-major, any floating dtype.
        bitmasks: Bits of each mask over ``[out, in]``: uint8 ``[out, ceil(in / 8)]``, 1 = active.

    Returns:
        ``[…, out]`` in the dtype of ``x`` (autocast's where it is on).

    Raises:
        RuntimeError: If ``x`` has another last dimension or dtype than the weight.

    Example:
        >>> from resu.core.mask import SparseMask
        >>> weight, mask = torch.tensor([[1.0, 2.0]]), SparseMask(torch.tensor([[True, False]]))
        >>> overlaid_linear(torch.ones(1, 2), weight, None, [torch.tensor([5.0])], [mask.packed])
        tensor([[6.]])
    """
    if x.shape[-1] != weight.shape[1]:
        raise RuntimeError(f"input of shape {tuple(x.shape)} used on a layer with {weight.shape[1]} inputs")
    x, bias = _autocast(x, bias, weight.dtype)
    y: Tensor = torch.ops.resu.overlaid_linear(x, weight, bias, list(thetas), list(bitmasks))
    return y


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bitmasks: Sequence[Tensor], *thetas: Tensor) -> Tensor:
        ctx.bitmasks, ctx.dtypes = bitmasks, [theta.dtype for theta in thetas]
        out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        for r0, r1, tile, _ in _tiles(weight, thetas, bitmasks, weight.dtype):
            out[r0:r1] = tile
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        masks = (SparseMask.from_packed(bits, grad.shape) for bits in ctx.bitmasks)
        pairs = zip(masks, ctx.dtypes, strict=True)
        return None, None, *(gather_theta(grad, mask).to(dtype) for mask, dtype in pairs)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def overlaid_weight(weight: Tensor, thetas: Sequence[Tensor], bitmasks: Sequence[Tensor]) -> Tensor:
    """``W_eff`` as a dense tensor ``[out, in]`` of the weight's dtype; gradients flow to every θ.

    For convolutions, inspection and export; arguments as of :func:`overlaid_linear`.
    """
    out: Tensor = _Weight.apply(weight, bitmasks, *thetas)  # type: ignore[no-untyped-call]
    return out
