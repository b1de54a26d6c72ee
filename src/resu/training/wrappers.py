"""Looking through what wraps a model while it trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

__all__ = ["plain_optimizer", "unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside ``torch.compile`` and data-parallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def plain_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer of torch inside what accelerate or Lightning wrap around it.

    Raises:
        TypeError: If there is none, as where DeepSpeed steps by itself.
    """
    found = optimizer
    while isinstance(inner := getattr(found, "optimizer", None), Optimizer):
        found = inner
    if not isinstance(found, Optimizer):
        raise TypeError(
            f"masks are enforced around the steps of a torch.optim.Optimizer, and {type(optimizer).__name__} holds "
            "none; train in one process, with DDP or with FSDP2"
        )
    return found
