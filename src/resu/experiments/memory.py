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
    """Parameters, buffers, gradients, optimizer state, and what a driver keeps (masks and θ).

    Args:
        model: The network.
        optimizer: Its optimizer.
        driver: A ``Sparsifier`` or ``RESUTrainer``, if there is one.
    """
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    tensors += _tensors(list(optimizer.state.values()))
    masks = 0  # resurrection layers hold theirs as buffers, a Sparsifier beside the model
    if hasattr(driver, "masks"):
        masks = sum(mask.nbytes for mask in driver.masks.values())
        held = getattr(driver, "_held", {}).values()
        tensors += [t for one in held for t in (one.theta, one.momentum, one.ever.packed) if t is not None]
    theta_optimizer = getattr(getattr(driver, "_cycle", None), "theta_optimizer", None)
    if theta_optimizer is not None:
        tensors += _tensors(list(theta_optimizer.state.values()))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) + masks
