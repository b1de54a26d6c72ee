"""What a training run is, as one frozen value: everything that decides its result, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from resu.core.counting import check_sparsity
from resu.core.pattern import get_pattern
from resu.experiments.data import datasets
from resu.experiments.networks import networks
from resu.experiments.tasks import Regime
from resu.experiments.train.methods import check_method
from resu.experiments.train.typed import ConfigError, check_options

__all__ = ["Compute", "Config", "Data", "Log", "Method", "Model", "Optimizer", "Schedule"]


def _demand(condition: bool, name: str, allowed: str, given: object) -> None:
    if not condition:
        raise ConfigError(f"{name} must be {allowed}, got {given!r}")


def _known(registry: Any, name: str) -> Any:
    try:
        return registry[name]
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _fields(section: Any) -> tuple[str, ...]:
    """The keys of a section that are no options of what it names."""
    return tuple(f.name for f in dataclasses.fields(section) if f.name != "options")


@dataclass(frozen=True)
class Data:
    """What is learned from.

    Attributes:
        name: One of ``resu.experiments.data.datasets``.
        dir: Its folder, or the one that holds it; None: ``RESU_DATA``.
        augment: Whether training images are cropped and flipped at random.
        options: Of this data set, e.g. ``context``.
    """

    name: str
    dir: str | None = None
    augment: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        load = _known(datasets, self.name)
        given = check_options(load, self.options, "data", _fields(self))
        object.__setattr__(self, "options", {**(load.__kwdefaults__ or {}), **given})


@dataclass(frozen=True)
class Model:
    """The network: one of ``resu.experiments.networks``, and its sizes."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        build = _known(networks, self.name).build
        given = check_options(build, self.options, "model", _fields(self))
        object.__setattr__(self, "options", {**(build.__kwdefaults__ or {}), **given})


@dataclass(frozen=True)
class Method:
    """How the network becomes sparse.

    Attributes:
        name: One of ``resu.experiments.methods.methods`` or of ``resu.training.algorithms.algorithms``.
        sparsity: Fraction removed in the end.
        distribution: How it is divided over layers; None: as the method has it. Or ``{glob: sparsity}``.
        pattern: Which positions compete (``"row"``, ``"2:4"``, …); None: as the method has it.
        include: Globs of weights to prune; None: as the model has it.
        exclude: Globs of weights to leave dense.
        label: What tables call it; None: its name.
        options: Fields of the algorithm that shall differ from those of the method.
    """

    name: str = "dense"
    sparsity: float = 0.0
    distribution: str | Mapping[str, float] | None = None
    pattern: str | None = None
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    label: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name == "dense":
            object.__setattr__(self, "sparsity", 0.0)  # so that a grid over sparsities has one dense run
        object.__setattr__(self, "options", check_method(self.name, self.options, _fields(self)))
        try:
            check_sparsity(self.sparsity, "method.sparsity")
            get_pattern(self.pattern)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        _demand(
            self.name == "dense" or self.sparsity > 0,
            "method.sparsity",
            f"above 0 for {self.name!r} ('dense' is the method without sparsity)",
            self.sparsity,
        )


@dataclass(frozen=True)
class Optimizer:
    """The optimizer.

    Attributes:
        name: Of ``torch.optim``.
        lr: Highest learning rate.
        weight_decay: On all parameters, or with ``decay_vectors: false`` not on biases and norms.
        momentum: Of SGD; ``nesterov`` as well.
        betas: Of Adam and AdamW.
    """

    name: Literal["sgd", "adam", "adamw"] = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    decay_vectors: bool = True
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, ...] = (0.9, 0.999)

    def __post_init__(self) -> None:
        _demand(self.lr > 0, "optimizer.lr", "above 0", self.lr)
        _demand(self.weight_decay >= 0, "optimizer.weight_decay", "at least 0", self.weight_decay)
        _demand(0 <= self.momentum < 1, "optimizer.momentum", "in [0, 1)", self.momentum)
        _demand(not self.nesterov or self.momentum > 0, "optimizer.momentum", "above 0 with nesterov", self.momentum)
        pair = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _demand(pair, "optimizer.betas", "two numbers in [0, 1)", list(self.betas))


@dataclass(frozen=True)
class Schedule:
    """The learning rate over the steps, as a factor of the highest.

    Attributes:
        name: ``"cosine"`` and ``"linear"`` fall to 0 at the end; ``"step"`` falls by ``gamma`` at each milestone.
        warmup: Fraction of the steps over which it rises from 0.
        milestones: Fractions of the steps.
    """

    name: Literal["cosine", "linear", "constant", "step"] = "cosine"
    warmup: float = 0.0
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1

    def __post_init__(self) -> None:
        _demand(0 <= self.warmup < 1, "schedule.warmup", "a fraction of the steps in [0, 1)", self.warmup)
        inside = all(0 < at < 1 for at in self.milestones) and list(self.milestones) == sorted(self.milestones)
        _demand(inside, "schedule.milestones", "rising fractions of the steps in (0, 1)", list(self.milestones))
        _demand(0 < self.gamma < 1, "schedule.gamma", "in (0, 1)", self.gamma)

    def factor(self, step: int, steps: int) -> float:
        """The factor at one step of so many."""
        warm = min(1.0, (step + 1) / max(1.0, self.warmup * steps))
        if self.name == "cosine":
            return warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        if self.name == "linear":
            return warm * (1 - step / steps)
        if self.name == "step":
            return warm * self.gamma ** sum(step >= at * steps for at in self.milestones)
        return warm


@dataclass(frozen=True)
class Compute:
    """Where and how it is computed.

    Attributes:
        device: ``"auto"`` takes a GPU where there is one.
        precision: ``"bfloat16"`` is autocast; weights stay float32.
        channels_last: Whether convolutions see channels last in memory.
        compile: Whether the network goes through ``torch.compile``.
        threads: Of the CPU; None: as torch has it.
        parallel: What several processes started by ``torchrun`` do: ``"ddp"``, a slice of each batch; ``"none"``
            refuses them.
    """

    device: str = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    channels_last: bool = False
    compile: bool = False
    threads: int | None = None
    parallel: Literal["none", "ddp"] = "ddp"

    def __post_init__(self) -> None:
        _demand(self.threads is None or self.threads >= 1, "compute.threads", "at least 1", self.threads)
        kind = self.device.partition(":")[0]
        _demand(kind in ("auto", "cpu", "cuda"), "compute.device", "auto, cpu, cuda or cuda:N", self.device)


@dataclass(frozen=True)
class Log:
    """What is written on the way, in steps between; 0: never.

    Attributes:
        every: Of a row in ``log.csv``.
        evaluate_every: Of a measurement on held-out data.
        checkpoint_every: Of a checkpoint; an interrupted run writes one anyway.
        tensorboard: Whether the same figures go to TensorBoard.
    """

    every: int = 50
    evaluate_every: int = 0
    checkpoint_every: int = 1000
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("every", "evaluate_every", "checkpoint_every"):
            _demand(getattr(self, name) >= 0, f"log.{name}", "at least 0", getattr(self, name))


@dataclass(frozen=True)
class Config:
    """A training run.

    Attributes:
        steps: Optimizer steps; or ``epochs``, passes over the training part.
        batch_size: Examples of one optimizer step, over all processes.
        accumulate: Parts that a batch is computed in, one after another, where it does not fit into memory at once.
        clip_norm: Largest norm of the gradient.
        regime: ``"scratch"``, or ``"finetune"`` of the trained network at ``start``: methods differ in what they do.
        start: A safetensors file whose values the network starts from; ``{seed}`` in it stands for the seed.
        seed: Of start values, batches, augmentation, dropout and random masks.
    """

    data: Data
    model: Model
    method: Method = field(default_factory=Method)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    compute: Compute = field(default_factory=Compute)
    log: Log = field(default_factory=Log)
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 128
    accumulate: int = 1
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    regime: Regime = "scratch"
    start: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        both = f"steps {self.steps}, epochs {self.epochs}"
        _demand((self.steps is None) != (self.epochs is None), "the length", "given by steps or by epochs", both)
        _demand(self.steps is None or self.steps >= 1, "steps", "at least 1", self.steps)
        _demand(self.epochs is None or self.epochs > 0, "epochs", "above 0", self.epochs)
        _demand(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        divides = self.accumulate >= 1 and self.batch_size % self.accumulate == 0
        _demand(divides, "accumulate", f"a divisor of batch_size {self.batch_size}", self.accumulate)
        _demand(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "above 0", self.clip_norm)
        _demand(0 <= self.label_smoothing < 1, "label_smoothing", "in [0, 1)", self.label_smoothing)
        _demand(self.seed >= 0, "seed", "at least 0", self.seed)
        started = self.regime == "scratch" or self.start is not None
        _demand(started, "start", "given for regime 'finetune': the file of a trained network", self.start)

    def total_steps(self, epoch: int) -> int:
        """Optimizer steps, where one pass has ``epoch`` examples."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * (epoch // self.batch_size)))
