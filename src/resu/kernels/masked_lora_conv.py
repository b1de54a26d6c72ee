"""Convolutions with a weight ``W + K ⊙ (left @ right)`` that exists only tile by tile; see ``masked_lora``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from resu.kernels.masked_lora import arguments, for_product, register, through_mask_
from resu.kernels.masked_weight import LOW, MaskedWeight, tile_limit

__all__ = ["masked_lora_conv2d"]


def _tiles(base: MaskedWeight, groups: int) -> Iterator[tuple[int, int, int, int]]:
    """``(r0, r1, first group, last group)``: tiles of whole groups, or within one where a group is too large."""
    per = base.rows // groups
    limit = tile_limit(base.bitmask.device)
    if per * base.columns > limit:
        step = max(1, limit // base.columns)
        for g in range(groups):
            for r0 in range(g * per, (g + 1) * per, step):
                yield r0, min(r0 + step, (g + 1) * per), g, g + 1
        return
    step = max(1, limit // max(per * base.columns, 1))
    for g in range(0, groups, step):
        last = min(g + step, groups)
        yield g * per, last * per, g, last


def _conv2d(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    base, (rule, kernel, stride, padding, dilation, groups) = MaskedWeight(*rest[:8]), rest[8:]
    wide_left, wide_right = left.to(base.wide), right.to(base.wide)
    per_group = x.shape[1] // groups
    parts = []
    for r0, r1, g0, g1 in _tiles(base, groups):
        tile = base.tile(wide_left, wide_right, r0, r1, rule, x.dtype).view(r1 - r0, per_group, *kernel)
        b = None if bias is None else bias[r0:r1]
        parts.append(F.conv2d(x[:, g0 * per_group : g1 * per_group], tile, b, stride, padding, dilation, g1 - g0))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _conv2d_backward(grad: Tensor, x: Tensor, left: Tensor, right: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    base, (rule, kernel, stride, padding, dilation, groups, needs) = MaskedWeight(*rest[:8]), rest[8:]
    need_x, need_left, need_right = needs
    wide_left, wide_right = left.to(base.wide), right.to(base.wide)
    per_group = x.shape[1] // groups
    wide = torch.float32 if x.dtype in LOW else x.dtype
    grad_x = torch.zeros(x.shape if need_x else (0,), dtype=wide, device=x.device)
    grad_left = torch.zeros_like(wide_left if need_left else wide_left.new_empty(0))
    grad_right = torch.zeros_like(wide_right if need_right else wide_right.new_empty(0))
    for r0, r1, g0, g1 in _tiles(base, groups):
        channels = slice(g0 * per_group, g1 * per_group)
        of_input, gradient, _ = torch.ops.aten.convolution_backward(
            grad[:, r0:r1].contiguous(),
            x[:, channels].contiguous(),
            base.tile(wide_left, wide_right, r0, r1, rule, x.dtype).view(r1 - r0, per_group, *kernel),
            None,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            g1 - g0,
            [need_x, need_left or need_right, False],
        )
        if need_x:
            grad_x[:, channels] += of_input
        if need_left or need_right:
            gradient = gradient.reshape(r1 - r0, -1).to(base.wide)
            through_mask_(gradient, base, r0, r1, rule)
            if need_left:
                torch.mm(gradient, wide_right.t(), out=grad_left[r0:r1])
            if need_right:
                grad_right.addmm_(wide_left[r0:r1].t(), gradient)
        del of_input, gradient  # before the next ones are made
    return grad_x.to(x.dtype), grad_left.to(left.dtype), grad_right.to(right.dtype)


def _conv2d_fake(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    _, kernel, stride, padding, dilation, groups = rest[8:]
    weight = x.new_empty(rest[0].shape[0], x.shape[1] // groups, *kernel)
    return x.new_empty(F.conv2d(x, weight, None, stride, padding, dilation, groups).shape)


register(
    "masked_lora_conv2d",
    "str rule, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups",
    _conv2d,
    _conv2d_backward,
    _conv2d_fake,
    (0, 2, 3),
)


def masked_lora_conv2d(
    x: Tensor,
    base: MaskedWeight,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None = None,
    *,
    rule: str = "mask",
    kernel: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Convolution with ``W + K ⊙ (left @ right)``; gradients flow to x, left, right and bias.

    Args:
        x: ``[batch, in, h, w]`` or ``[in, h, w]``, of the weight's dtype unless autocast is on.
        base: The frozen weight ``[out, in / groups, kh, kw]``, seen as ``[out, in / groups · kh · kw]``.
        left: ``[out, r]``, any floating dtype.
        right: ``[r, in / groups · kh · kw]``.
        bias: ``[out]`` or None.
        rule: As in :func:`resu.kernels.masked_lora.masked_lora_linear`.
        kernel: ``(kh, kw)``.
        stride: Of the convolution; ``padding`` (zeros), ``dilation`` and ``groups`` likewise.
        padding: Zeros on each side.
        dilation: Of the kernel.
        groups: Output channel o of group g sees the input channels of that group.

    Returns:
        ``[batch, out, h', w']`` or ``[out, h', w']``.

    Raises:
        ValueError: If factors do not fit or the rule is unknown.
        RuntimeError: If the input does not fit, or the base weight requires a gradient.

    Example:
        >>> from resu.core.mask import SparseMask
        >>> weight = torch.zeros(1, 1, 1, 2)
        >>> base = MaskedWeight.dense(weight, SparseMask(torch.tensor([[[[True, False]]]])).packed)
        >>> masked_lora_conv2d(torch.ones(1, 1, 2), base, torch.ones(1, 1), torch.ones(1, 2), kernel=(1, 2))
        tensor([[[1.]]])
    """
    x, bias = for_product(x, left, right, bias, base, rule)
    batch = x if x.ndim == 4 else x.unsqueeze(0)
    if batch.shape[1] * kernel[0] * kernel[1] != base.columns * groups:
        raise RuntimeError(
            f"input of shape {tuple(x.shape)} used on a layer with {base.columns * groups // (kernel[0] * kernel[1])} "
            "input channels"
        )
    y: Tensor = torch.ops.resu.masked_lora_conv2d(
        batch, left, right, bias, *arguments(base), rule, list(kernel), list(stride), list(padding), list(dilation),
        groups,
    )  # fmt: skip
    return y if x.ndim == 4 else y.squeeze(0)
