"""Optimizers by name, over what trains and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from resu.integrations.finetune.config import FinetuneConfig
from resu.training.adamw8bit import AdamW8bit
from resu.training.update_in_backward import optimizer_in_backward

__all__ = ["make_optimizer", "trained"]


def trained(model: nn.Module, leave_out: Iterable[nn.Parameter] = ()) -> dict[str, nn.Parameter]:
    """Parameters that require a gradient, by name, without those of layers that update themselves."""
    left = {id(p) for p in leave_out}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in left}


def make_optimizer(parameters: dict[str, nn.Parameter], config: FinetuneConfig) -> Optimizer:
    """The optimizer of a run.

    Weight decay acts on matrices and θ; norms and biases have none. Without parameters (all layers update themselves)
    it holds one empty tensor, so that there is something for a schedule of the step size to act on.
    """
    decayed = [p for name, p in parameters.items() if p.ndim > 1 or name.rpartition(".")[2] == "theta"]
    others = [p for name, p in parameters.items() if not any(p is one for one in decayed)]
    groups: list[dict[str, Any]] = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((decayed, config.weight_decay), (others, 0.0))
        if group
    ]
    groups = groups or [{"params": [nn.Parameter(torch.zeros(0))], "weight_decay": 0.0}]
    if config.in_backward:
        return optimizer_in_backward(groups, lambda some: _made(some, config))
    return _made(groups, config)


def _made(groups: list[dict[str, Any]], config: FinetuneConfig) -> Optimizer:
    rate = config.step_size
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9)
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=rate)
    return AdamW8bit(groups, lr=rate, seed=config.seed)
