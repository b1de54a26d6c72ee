"""Sums over the inputs of a layer: squares, plain sums and outer products, of rows or of unfolded images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CONVOLUTIONS", "Moments", "columns_of", "window_sums"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CHUNK = 1 << 24  # elements of unfolded input at a time


class Moments:
    """Sums over tokens for ``parts`` matrices that see inputs of their own (experts, groups of a convolution).

    Attributes:
        counts: Tokens (or image positions) seen by each part.
        squares: Σ x², float64 in main memory, ``[parts, in…]``.
        sums: Σ x, likewise.
        products: Σ x xᵀ, ``[parts, in, in]`` in float32 (float64 for float64 inputs), if asked for.
    """

    def __init__(self, parts: int, inputs: bool, products: bool) -> None:
        self.parts = parts
        self.inputs = inputs
        self.outer = products
        self.counts = [0] * parts
        self.squares: Tensor | None = None
        self.sums: Tensor | None = None
        self.products: Tensor | None = None
        self.wide = torch.float32

    def add_rows(self, part: int, x: Tensor, product: Tensor | None = None) -> None:
        """Add ``x [tokens, in]``; ``product`` is ``xᵀ x`` where somebody has it already."""
        self.wide = torch.promote_types(x.dtype, torch.float32)
        if not x.shape[0]:
            return
        self.counts[part] += x.shape[0]
        if self.inputs:
            # Norms, not their squares, in float32: the squares of what bf16 can hold would overflow.
            norm = torch.linalg.vector_norm(x, dim=0, dtype=self.wide)
            norm, total = torch.stack([norm, x.sum(dim=0, dtype=self.wide)]).cpu().double()
            if self.wide == torch.float32 and not bool(torch.isfinite(norm).all()):
                norm = torch.linalg.vector_norm(x.cpu(), dim=0, dtype=torch.float64)
            self.add_sums(part, norm.square(), total)
        if self.outer:
            self.add_product(part, outer_product(x) if product is None else product)

    def add_sums(self, part: int, squares: Tensor, sums: Tensor) -> None:
        """Add Σ x² and Σ x of one part."""
        if self.squares is None or self.sums is None:
            self.squares = squares.new_zeros(self.parts, *squares.shape, dtype=torch.float64)
            self.sums = torch.zeros_like(self.squares)
        self.squares[part] += squares
        self.sums[part] += sums

    def add_product(self, part: int, product: Tensor) -> None:
        """Add Σ x xᵀ of one part."""
        if self.products is None:
            self.products = product.new_zeros(self.parts, *product.shape)
        self.products[part] += product

    def add_images(self, conv: nn.Module, x: Tensor) -> None:
        """Add the columns of the unfolded ``x`` that ``conv`` multiplies; one part per group."""
        assert isinstance(conv, CONVOLUTIONS)
        self.wide = torch.promote_types(x.dtype, torch.float32)
        padded = _padded(conv, x)
        positions = padded.shape[0] * math.prod(_outputs(conv, padded))
        if not positions:
            return
        for part in range(self.parts):
            self.counts[part] += positions
        if self.inputs:
            wider = padded.to(self.wide)
            squares, sums = (window_sums(conv, x).cpu().double() for x in (wider.square(), wider))
            for part, (square, total) in enumerate(zip(squares.chunk(self.parts), sums.chunk(self.parts), strict=True)):
                self.add_sums(part, square, total)
        if self.outer:
            for columns in columns_of(conv, padded):
                for part in range(self.parts):
                    self.add_product(part, outer_product(columns[part]))


def outer_product(x: Tensor) -> Tensor:
    """``xᵀ x`` of ``[tokens, in]`` in float32 (float64 for float64), whatever autocast would make of it."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):
        return x.t() @ x


def _padded(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    x = x if x.ndim == len(conv.kernel_size) + 2 else x.unsqueeze(0)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)


def _outputs(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, padded: Tensor) -> list[int]:
    return [
        max(0, (size - dilation * (kernel - 1) - 1) // stride + 1)
        for size, kernel, stride, dilation in zip(
            padded.shape[2:], conv.kernel_size, conv.stride, conv.dilation, strict=True
        )
    ]


def window_sums(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, padded: Tensor) -> Tensor:
    """Sum of each column of the unfolded, already padded input, ``[in, *kernel]``, without unfolding it."""
    sums = padded.new_zeros(padded.shape[1], *conv.kernel_size)
    outputs = _outputs(conv, padded)
    for offset in itertools.product(*map(range, conv.kernel_size)):
        window = [slice(None), slice(None)] + [
            slice(o * d, o * d + s * (n - 1) + 1, s)
            for o, d, s, n in zip(offset, conv.dilation, conv.stride, outputs, strict=True)
        ]
        here: tuple[Any, ...] = (slice(None), *offset)
        sums[here] = padded[tuple(window)].sum(dim=[0, *range(2, padded.ndim)])
    return sums


def columns_of(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, padded: Tensor) -> Iterator[Tensor]:
    """The unfolded input, ``[groups, positions, in / groups * kernel]``, some images at a time."""
    kernel = conv.kernel_size
    each = padded.shape[1] * math.prod(kernel) * max(1, math.prod(_outputs(conv, padded)))
    for images in padded.split(max(1, _CHUNK // each)):
        windows = images
        for i, (size, stride, dilation) in enumerate(zip(kernel, conv.stride, conv.dilation, strict=True)):
            windows = windows.unfold(2 + i, dilation * (size - 1) + 1, stride)[..., ::dilation]
        # [images, in, positions…, kernel…] → [groups, images * positions, in / groups * kernel]
        spatial = len(kernel)
        windows = windows.unflatten(1, (conv.groups, -1))
        order = [1, 0, *range(3, 3 + spatial), 2, *range(3 + spatial, 3 + 2 * spatial)]
        moved = windows.permute(order)
        yield moved.reshape(conv.groups, -1, padded.shape[1] // conv.groups * math.prod(kernel))
