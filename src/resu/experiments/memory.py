"""Bytes that training holds, counted from the tensors themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["held_bytes"]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def held_bytes(model: nn.Module, optimizer: Optimizer, driver: Any = None) -> int:
    """Parameters, buffers, gradients, optimizer state, and what a driver keeps (masks and θ)."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    tensors += _tensors(list(optimizer.state.values()))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    extra = 0
    if driver is not None:
        state = driver.state_dict()
        extra = sum(t.nbytes for t in _tensors([state.get("masks", {}), state.get("theta", {})]))
    return sum(storages.values()) + extra
