"""All that changes while a run goes on: how it is made, saved and found again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resu.experiments.data import TrainingData
from resu.experiments.methods import Plan, Setting
from resu.experiments.networks import networks
from resu.experiments.train.config import Config
from resu.experiments.train.methods import setting_of
from resu.experiments.train.optimizers import make_optimizer
from resu.experiments.train.placement import Placement
from resu.experiments.train.typed import ConfigError
from resu.formats.files import load_checkpoint, save_checkpoint
from resu.training import Sparsifier
from resu.training.algorithms import algorithms

__all__ = ["State"]


class State:
    """Network, optimizer and driver of a run, and how far it is.

    Attributes:
        model: The plain network.
        network: The same as it is called while training: compiled, or wrapped for several processes.
        setting: What the method does.
        steps: Optimizer steps of the whole run; ``step`` are done.
        seconds: Spent on them.
        losses: Sum of the losses since the last row of the log, and their count.
    """

    def __init__(self, config: Config, data: TrainingData, placement: Placement) -> None:
        self.config, self.placement = config, placement
        self.steps = config.total_steps(data.epoch)
        self.setting: Setting = setting_of(config.method, Plan(config.method.sparsity, self.steps, config.regime))
        self.model = self._build(data)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.sparsifier: Sparsifier | None = self._sparsifier()
        self.network = self._wrapped()
        self.step = 0
        self.seconds = 0.0
        self.losses = torch.zeros(2, dtype=torch.float64, device=placement.device)

    def _build(self, data: TrainingData) -> nn.Module:
        """The network with the start values of its seed, or those of a file."""
        torch.manual_seed(self.config.seed)
        model = networks[self.config.model.name].build(data, **self.config.model.options)
        if self.config.start is not None:
            start = Path(self.config.start.replace("{seed}", str(self.config.seed)))
            if not start.is_file():
                raise ConfigError(f"start: there is no file {start}")
            load_checkpoint(start, model)
        return self.placement.model(model)

    def _sparsifier(self) -> Sparsifier | None:
        if self.setting.driver == "dense":
            return None
        method = self.config.method
        include = method.include if method.include is not None else networks[self.config.model.name].include
        return Sparsifier(
            self.model,
            self.optimizer,
            algorithms[self.setting.algorithm](**self.setting.options),
            pattern=self.setting.pattern,
            distribution=self.setting.distribution if method.distribution is None else method.distribution,
            include=include,
            exclude=method.exclude,
            seed=self.config.seed,
        )

    def _wrapped(self) -> nn.Module:
        network = self.model
        if self.config.compute.compile:
            network = torch.compile(network)  # type: ignore[assignment]
        if self.placement.ranks.world > 1:
            device = self.placement.device
            network = nn.parallel.DistributedDataParallel(
                network, device_ids=[device] if device.type == "cuda" else None
            )
        return network

    def add_loss(self, loss: Tensor) -> None:
        """Count the loss of one step."""
        self.losses[0] += loss
        self.losses[1] += 1

    def mean_loss(self) -> float:
        """The mean since this was last asked, over all processes."""
        total, count = self.placement.total(self.losses).tolist()
        self.losses.zero_()
        return total / count if count else float("nan")

    def save(self, path: Path) -> None:
        """Write a checkpoint, from which a run goes on bit for bit; the first of several processes does."""
        losses = self.placement.total(self.losses.clone()) / self.placement.ranks.world
        if self.placement.ranks.rank != 0:
            return
        extra: dict[str, Any] = {
            "optimizer": self.optimizer.state_dict(),
            "run": {"step": self.step, "seconds": self.seconds, "losses": losses.cpu()},
        }
        if self.sparsifier is not None:
            extra["sparsifier"] = self.sparsifier.state_dict()
        save_checkpoint(self.model, path, extra=extra, overwrite=True)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        extra = load_checkpoint(path, self.model).extra
        self.optimizer.load_state_dict(extra["optimizer"])
        _lay_alike(self.optimizer)
        if self.sparsifier is not None:
            self.sparsifier.load_state_dict(extra["sparsifier"])
        run = extra["run"]
        self.step, self.seconds = int(run["step"]), float(run["seconds"])
        self.losses = run["losses"].to(self.placement.device)


def _lay_alike(optimizer: torch.optim.Optimizer) -> None:
    """Lay out an optimizer's state in memory as its parameters are.

    Fused optimizers go through the memory of both in step and do not look at strides, and a file keeps none.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
