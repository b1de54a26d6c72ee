"""Runs of the resurrection cycles (``RESUTrainer``) under the same conditions as every other method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from resu.experiments.data import Batch
from resu.experiments.methods import Plan, Setting
from resu.experiments.tasks import Task

__all__ = ["run_cycles"]


def run_cycles(
    task: Task,
    setting: Setting,
    plan: Plan,
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterator[Batch],
    seed: int,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> tuple[nn.Module, Mapping[str, Tensor], int]:
    """Train by cycles, then ``setting.tail`` steps with the last mask; see :func:`recipes.train`."""
    raise NotImplementedError("TODO")
