"""Optimizers of a configuration."""

from __future__ import annotations

import torch
from torch import nn

from resu.experiments.train.config import Optimizer

__all__ = ["make_optimizer"]


def make_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """The optimizer of all parameters of a model."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for _, p in named], "weight_decay": settings.weight_decay}]
    if settings.weight_decay and not settings.decay_vectors:
        groups = [
            {"params": [p for _, p in named if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
        ]
    groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        return torch.optim.SGD(
            groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.nesterov, fused=True
        )
    kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=settings.lr, betas=(settings.betas[0], settings.betas[1]), fused=True)
