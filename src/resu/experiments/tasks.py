"""What is learned: a data set, a network, and one training recipe common to every method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resu.core.registry import Registry
from resu.experiments.data import Dataset, load
from resu.experiments.models import CharGPT, SmallConv, mlp

__all__ = ["Part", "Regime", "Task", "evaluate", "loss_of", "tasks"]

Regime = Literal["scratch", "finetune"]
Part = Literal["val", "test"]


@dataclass(frozen=True)
class Task:
    """One row of settings; every method trains with exactly these.

    Attributes:
        name: What ``--task`` takes.
        data: Name of the data set.
        build: Makes the untrained network for a data set.
        steps: Optimizer steps from scratch; fine-tuning gets ``finetune_steps``.
        batch_size: Examples per step.
        lr: Highest learning rate of Adam from scratch; fine-tuning has ``finetune_lr``. Both warm up over
            ``warmup`` of the steps and fall to zero along half a cosine.
        metric: ``"accuracy"`` (percent, higher is better) or ``"loss"`` (nats, lower is better).
        include: Globs of the weights that are pruned; None: every linear and convolution weight.
    """

    name: str
    data: str
    build: Callable[[Any], nn.Module]
    steps: int
    finetune_steps: int
    batch_size: int
    lr: float
    finetune_lr: float
    warmup: float = 0.02
    metric: Literal["accuracy", "loss"] = "accuracy"
    include: tuple[str, ...] | None = None

    def dataset(self, directory: str | Path | None = None) -> Dataset:
        """The data, from ``directory``, else ``RESU_DATA``."""
        return load(self.data, directory)

    def model(self, data: Dataset, seed: int) -> nn.Module:
        """The untrained network of that seed; the global random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build(data)

    def steps_of(self, regime: Regime) -> int:
        """Optimizer steps that a run of the regime has."""
        return self.steps if regime == "scratch" else self.finetune_steps

    def learning_rate(self, regime: Regime, step: int) -> float:
        """The learning rate of one step."""
        steps = self.steps_of(regime)
        highest = self.lr if regime == "scratch" else self.finetune_lr
        warm = min(1.0, (step + 1) / max(1.0, self.warmup * steps))
        return highest * warm * 0.5 * (1 + math.cos(math.pi * step / steps))

    def describe(self, regime: Regime) -> str:
        """The settings that two comparable rows share."""
        lr = self.lr if regime == "scratch" else self.finetune_lr
        return f"adam lr={lr:g} cosine warmup={self.warmup:g} batch={self.batch_size}"

    def shortened(self, factor: int) -> Task:
        """The same task with ``factor`` times fewer steps."""
        steps = (max(1, self.steps // factor), max(1, self.finetune_steps // factor))
        return replace(self, steps=steps[0], finetune_steps=steps[1])


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross entropy, for labels and for sequences alike."""
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, data: Dataset, part: Part, metric: str) -> float:
    """Accuracy in percent or mean loss over a whole part; the model is left in its mode."""
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for x, y in data.evaluation(part):
        logits = model(x).flatten(0, -2)
        labels = y.flatten()
        if metric == "accuracy":
            total += float((logits.argmax(1) == labels).sum())
        else:
            total += float(F.cross_entropy(logits, labels, reduction="sum"))
        count += len(labels)
    model.train(training)
    return 100 * total / count if metric == "accuracy" else total / count


tasks: Registry[Task] = Registry("task")


def _add(task: Task) -> None:
    tasks.register(task.name)(task)


_add(
    Task(
        *("mlp", "fashion-mnist", lambda data: mlp(784, 300, 100, 10)),
        *(4000, 1500, 128),
        lr=2e-3,
        finetune_lr=2e-3,
    )
)
_add(
    Task(
        *("conv", "fashion-mnist", lambda data: SmallConv(1, data.classes)),
        *(3000, 1000, 64),
        lr=2e-3,
        finetune_lr=2e-3,
    )
)
_add(
    Task(
        *("gpt", "tinyshakespeare", lambda data: CharGPT(data.classes, data.context)),
        *(2400, 800, 16),
        lr=2e-3,
        finetune_lr=1e-3,
        metric="loss",
        include=("blocks.*",),
    )
)
_add(
    Task(
        *("digits", "digits", lambda data: mlp(64, 128, 64, 10)),
        *(600, 200, 64),
        lr=2e-3,
        finetune_lr=1e-3,
    )
)
