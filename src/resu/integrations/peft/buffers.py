"""Tensors of each adapter that do not train: mask bits, codes, scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor

__all__ = ["Exact"]


class Exact(BufferDict):
    """``{adapter name: tensor}``, part of the module; ``.half()`` and the like move it but do not cast it.

    What is computed from an entry can be kept beside it with :meth:`derived`; it is forgotten when entries change.
    """

    def __init__(self, *, persistent: bool = True) -> None:
        super().__init__(persistent=persistent)
        self._derived: dict[str, Any] = {}

    def derived(self, name: str, make: Callable[[], Any]) -> Any:
        """``make()``, called again only after an entry has changed."""
        if name not in self._derived:
            self._derived[name] = make()
        return self._derived[name]

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._derived = {}
        super().__setitem__(name, tensor)  # type: ignore[no-untyped-call]

    def __delitem__(self, name: str) -> None:
        self._derived = {}
        super().__delitem__(name)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any) -> None:
        self._derived = {}
        super()._load_from_state_dict(*args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._derived = {}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device) if not moved.is_meta else torch.empty_like(tensor, device="meta")

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self
