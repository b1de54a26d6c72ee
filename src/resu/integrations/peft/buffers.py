"""Tensors of each adapter that do not train: mask bits, codes, scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor

__all__ = ["Exact"]


class Exact(BufferDict):
    """``{adapter name: tensor}``, part of the module; ``.half()`` and the like move it but do not cast it."""

    def __init__(self, *, persistent: bool = True) -> None:
        super().__init__(persistent=persistent)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device) if not moved.is_meta else torch.empty_like(tensor, device="meta")

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self
