"""Linear layers with a weight ``W + K ⊙ (left @ right)`` that exists only tile by tile, forward and backward.

``K`` is the mask (``W_eff = M ⊙ (W + s·BA)``: MaskLoRA, arXiv 2312.15230) or the base weight itself
(``W_eff = W ⊙ (1 + s·BA)``). Rows are put together, multiplied and forgotten; the gradient of the adapter is taken from
the weight gradient of one tile at a time. Nothing of the weight's size is allocated or kept, whether the base weight is
dense or packed.

The operators are registered with ``torch.library``, so that ``torch.compile`` sees one opaque call and does not break
the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resu.kernels.masked_weight import LOW, RULES, MaskedWeight

__all__ = ["BASE", "arguments", "for_product", "masked_lora_linear", "register"]

_library = torch.library.Library("resu", "FRAGMENT")
BASE = (
    "Tensor bitmask, int columns, Tensor? weight, Tensor? codes, Tensor? scale, Tensor? zero, Tensor? offsets, int bits"
)


def arguments(base: MaskedWeight) -> tuple[Any, ...]:
    """A base weight as operators take it, in the order of ``BASE``."""
    return (
        base.bitmask, base.columns, base.weight, base.codes, base.scale, base.zero, base.offsets, base.bits,
    )  # fmt: skip


def _linear(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    base, (rule, transposed) = MaskedWeight(*rest[:8]), rest[8:]
    wide_left, wide_right = left.to(base.wide), right.to(base.wide)
    flat = x.reshape(-1, base.rows if transposed else base.columns)
    n = base.columns if transposed else base.rows
    if not transposed:
        y = x.new_empty(flat.shape[0], n)
        for r0, r1 in base.tiles():
            tile = base.tile(wide_left, wide_right, r0, r1, rule, x.dtype)
            if bias is None:
                torch.mm(flat, tile.t(), out=y[:, r0:r1])
            else:
                torch.addmm(bias[r0:r1], flat, tile.t(), out=y[:, r0:r1])
            del tile  # before the next one is made
        return y.view(*x.shape[:-1], n)
    # Rows are inputs: every tile adds to the whole output, and low precision would round at every one of them.
    total = _wide_zeros((flat.shape[0], n), x)
    for r0, r1 in base.tiles():
        _add_product(total, flat[:, r0:r1], base.tile(wide_left, wide_right, r0, r1, rule, x.dtype))
    if bias is not None:
        total += bias
    return total.to(x.dtype).view(*x.shape[:-1], n)


def _linear_backward(grad: Tensor, x: Tensor, left: Tensor, right: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    base, (rule, transposed, (need_x, need_left, need_right)) = MaskedWeight(*rest[:8]), rest[8:]
    wide_left, wide_right = left.to(base.wide), right.to(base.wide)
    flat = x.reshape(-1, base.rows if transposed else base.columns)
    grad = grad.reshape(-1, base.columns if transposed else base.rows)
    grad_x = _wide_zeros(flat.shape if need_x else (0,), x)
    grad_left = torch.zeros_like(wide_left if need_left else wide_left.new_empty(0))
    grad_right = torch.zeros_like(wide_right if need_right else wide_right.new_empty(0))
    for r0, r1 in base.tiles():
        rows, others = (flat, grad) if transposed else (grad, flat)
        if need_x:
            tile = base.tile(wide_left, wide_right, r0, r1, rule, x.dtype)
            if transposed:
                grad_x[:, r0:r1] = grad @ tile.t()
            else:
                _add_product(grad_x, grad[:, r0:r1], tile)
            del tile  # one tile at a time
        if need_left or need_right:
            gradient = (rows[:, r0:r1].t() @ others).to(base.wide)
            through_mask_(gradient, base, r0, r1, rule)
            if need_left:
                torch.mm(gradient, wide_right.t(), out=grad_left[r0:r1])
            if need_right:
                grad_right.addmm_(wide_left[r0:r1].t(), gradient)
            del gradient
    return (
        grad_x.to(x.dtype).view(x.shape if need_x else (0,)), grad_left.to(left.dtype), grad_right.to(right.dtype),
    )  # fmt: skip


def through_mask_(gradient: Tensor, base: MaskedWeight, r0: int, r1: int, rule: str) -> Tensor:
    """Turn the gradient of a tile of ``W_eff`` into that of ``left @ right``, in place: ``K ⊙ gradient``."""
    if rule == "scale":
        return gradient.mul_(base.base(r0, r1))
    return base.mask_(gradient, r0, r1) if rule == "mask" else gradient


def _wide_zeros(shape: tuple[int, ...] | torch.Size, x: Tensor) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32 if x.dtype in LOW else x.dtype, device=x.device)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _linear_fake(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    bitmask, columns, transposed = rest[0], rest[1], rest[-1]
    return x.new_empty(*x.shape[:-1], columns if transposed else bitmask.shape[0])


def backward_fake(grad: Tensor, x: Tensor, left: Tensor, right: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """What the backward operators return, without values."""
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in zip((x, left, right), rest[-1], strict=True))


# -- registration ---------------------------------------------------------------------------------------
def register(name: str, options: str, forward: Any, backward: Any, fake: Any, bias_dims: tuple[int, ...]) -> None:
    """Register ``resu::NAME`` and ``resu::NAME_backward``, and how autograd goes from one to the other.

    Args:
        name: Of the operator; its arguments are x, left, right, bias, ``BASE`` and the options.
        options: Their schema.
        forward: ``(x, left, right, bias, *base, *options) -> y``.
        backward: ``(grad, x, left, right, *base, *options, needs) -> gradients of x, left, right`` (empty if not
            needed).
        fake: The forward without values.
        bias_dims: Dimensions of ``y`` that the gradient of the bias sums over.
    """
    _library.define(f"{name}(Tensor x, Tensor left, Tensor right, Tensor? bias, {BASE}, {options}) -> Tensor")
    _library.define(
        f"{name}_backward(Tensor grad, Tensor x, Tensor left, Tensor right, {BASE}, {options}, bool[3] needs)"
        " -> (Tensor, Tensor, Tensor)"
    )
    _library.impl(name, forward, "CompositeExplicitAutograd")
    _library.impl(f"{name}_backward", backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"resu::{name}", fake, lib=_library)
    torch.library.register_fake(f"resu::{name}_backward", backward_fake, lib=_library)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, left, right, bias, bitmask, columns, weight, codes, scale, zero, offsets, *ctx.rest = inputs
        ctx.save_for_backward(x, left, right, bitmask, weight, codes, scale, zero, offsets)
        ctx.columns, ctx.bias = columns, bias is not None

    def autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, left, right, bitmask, *parts = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        call = getattr(torch.ops.resu, f"{name}_backward")
        found = call(grad, x, left, right, bitmask, ctx.columns, *parts, *ctx.rest, needs) if any(needs) else [None] * 3
        dims = [d % grad.ndim for d in bias_dims] if bias_dims else list(range(grad.ndim - 1))
        of_bias = (grad.sum(dim=dims) if dims else grad) if ctx.bias and ctx.needs_input_grad[3] else None
        wanted = [g if need else None for g, need in zip(found, needs, strict=True)]
        return (*wanted, of_bias, *([None] * (7 + len(ctx.rest))))

    torch.library.register_autograd(f"resu::{name}", autograd, setup_context=setup, lib=_library)


register("masked_lora_linear", "str rule, bool transposed", _linear, _linear_backward, _linear_fake, ())


def for_product(
    x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, base: MaskedWeight, rule: str
) -> tuple[Tensor, Tensor | None]:
    """Check what an operator is given; input and bias in the dtype that torch's own product would use here."""
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; known: {', '.join(RULES)}")
    if left.shape != (base.rows, right.shape[0]) or right.shape[1:] != (base.columns,):
        raise ValueError(
            f"left of shape {tuple(left.shape)} and right of shape {tuple(right.shape)} do not fit a weight seen as "
            f"[{base.rows}, {base.columns}]; they are [{base.rows}, r] and [r, {base.columns}]"
        )
    if base.weight is not None and base.weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("the base weight requires a gradient, which masked_lora does not compute; freeze it")
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return x.to(dtype), None if bias is None else bias.to(dtype)
    if base.weight is not None and x.dtype != base.weight.dtype:
        raise RuntimeError(
            f"input has dtype {x.dtype} but the layer has {base.weight.dtype}; convert one or use autocast"
        )
    return x, bias


def masked_lora_linear(
    x: Tensor,
    base: MaskedWeight,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None = None,
    *,
    rule: str = "mask",
    transposed: bool = False,
) -> Tensor:
    """``x @ W_eff.T + bias`` with ``W_eff = W + K ⊙ (left @ right)``; gradients flow to x, left, right and bias.

    Several adapters are one: their factors side by side, ``left = [s₁B₁ s₂B₂]``, ``right = [A₁; A₂]``.

    Args:
        x: ``[…, in]``, of the weight's dtype unless autocast is on.
        base: The frozen weight ``[out, in]``, or ``[in, out]`` with ``transposed``.
        left: ``[rows of the weight, r]``, any floating dtype: ``s·B``.
        right: ``[r, columns of the weight]``: ``A``. The product is taken in float32 (float64 for a float64 weight).
        bias: ``[out]`` or None.
        rule: What K is: ``"mask"``, ``"scale"`` (the base weight) or ``"dense"`` (1 everywhere).
        transposed: Whether the weight is stored inputs first (Hugging Face ``Conv1D``).

    Returns:
        ``[…, out]``, in the dtype of ``x`` (of autocast where it is on).

    Raises:
        ValueError: If factors do not fit or the rule is unknown.
        RuntimeError: If the input does not fit, or the base weight requires a gradient.

    Example:
        >>> from resu.core.mask import SparseMask
        >>> mask = SparseMask(torch.tensor([[True, False]]))
        >>> base = MaskedWeight.dense(torch.tensor([[2.0, 0.0]]), mask.packed)
        >>> masked_lora_linear(torch.ones(1, 2), base, torch.ones(1, 1), torch.ones(1, 2))
        tensor([[3.]])
    """
    inputs = base.rows if transposed else base.columns
    if x.shape[-1] != inputs:
        raise RuntimeError(f"input of shape {tuple(x.shape)} used on a layer with {inputs} inputs")
    x, bias = for_product(x, left, right, bias, base, rule)
    y: Tensor = torch.ops.resu.masked_lora_linear(x, left, right, bias, *arguments(base), rule, transposed)
    return y
