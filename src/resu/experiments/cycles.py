"""Runs of the resurrection cycles (``RESUTrainer``) under the same conditions as every other method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resu.experiments.data import Batch
from resu.experiments.memory import held_bytes
from resu.experiments.methods import Plan, Setting
from resu.experiments.tasks import Task, loss_of

__all__ = ["run_cycles"]


class _Stream:
    """The batches of a run as a loader: each ``iter()`` goes on where the last one stopped."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)


class _Watch:
    """Sets the common learning rate before each step, counts bytes, passes losses on."""

    def __init__(
        self,
        task: Task,
        plan: Plan,
        optimizer: Optimizer,
        on_step: Callable[[int, Tensor], None] | None,
    ) -> None:
        self.task, self.plan, self.optimizer, self.on_step = task, plan, optimizer, on_step
        self.held = 0
        self.set_rate(0)

    def set_rate(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.task.learning_rate(self.plan.regime, step)

    def __call__(self, trainer: Any, event: str, info: dict[str, Any]) -> None:
        if event != "step":
            return
        done = int(info["step"])
        self.set_rate(done)
        if done % max(1, self.plan.steps // 60) == 0:
            self.held = max(self.held, held_bytes(trainer.model, self.optimizer, trainer))
        if self.on_step is not None:
            self.on_step(done - 1, torch.tensor(info["loss"]))


def run_cycles(
    task: Task,
    setting: Setting,
    plan: Plan,
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterator[Batch],
    seed: int,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> tuple[dict[str, Tensor], int]:
    """Train ``model`` in place by all cycles of a setting; its layers then hold their masks.

    θ has the learning rate of the configuration, everything else that of the task, step by step.

    Returns:
        The masks by parameter name, and the bytes held.
    """
    from resu.training import RESUConfig, RESUTrainer

    config = RESUConfig.from_dict({**setting.options, "seed": seed})
    watch = _Watch(task, plan, optimizer, on_step)
    trainer = RESUTrainer(
        model,
        config,
        optimizer,
        lambda network, batch: loss_of(network, *batch),
        callbacks=[watch],
        include=task.include,
        progress=False,
    )
    if trainer.config.total_steps + setting.tail != plan.steps:
        raise ValueError(
            f"the cycles take {config.total_steps} steps and {setting.tail} follow; the plan has {plan.steps}"
        )
    trainer.train(_Stream(batches))
    return masks_of(trainer.layers), watch.held


def masks_of(layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """Masks of resurrection layers by parameter name."""
    masks = {}
    for name, layer in layers.items():
        full = torch.ones(layer.weight.shape, dtype=torch.bool)
        masks[f"{name}.weight" if name else "weight"] = full if layer.mask is None else layer.mask.mask
    return masks
