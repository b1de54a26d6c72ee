"""Structured pruning in steps: stage by stage with fine-tuning between, or along a ramp beside a training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from resu.core.counting import check_sparsity
from resu.core.schedule import Cubic, Every
from resu.pruning.stages import of_model_and_stage
from resu.pruning.structured.block_pruner import BlockPruner
from resu.pruning.structured.pruner import StructuredPruner
from resu.pruning.structured.result import StructuredResult
from resu.pruning.structured.running import plain_copy
from resu.pruning.structured.sizes import count_macs, count_parameters

__all__ = ["GradualShrinker", "shrink_iteratively"]


def shrink_iteratively(
    model: nn.Module,
    pruner: StructuredPruner | BlockPruner,
    stages: int | Sequence[float],
    finetune_fn: Callable[..., object] | None = None,
    *,
    optimizer: Optimizer | None = None,
) -> list[StructuredResult]:
    """Remove in stages, each verified, with fine-tuning after each; in place.

    All sparsities are of the model as it was given, so that the last stage ends where one shot would have.

    Args:
        model: Any module.
        pruner: What to remove by; its sparsity is that of the last stage.
        stages: How many equal steps, or the sparsity after each, ascending, the last one the pruner's.
        finetune_fn: ``finetune_fn(model)``, or ``finetune_fn(model, stage)`` if it needs a second argument (1, 2, …).
            Parameters are new objects after each stage: make the optimizer inside, or pass it as ``optimizer``.
        optimizer: Follows each removal.

    Returns:
        One result per stage; only the last one's ``undo()`` still leads back, by one stage.

    Raises:
        ValueError: If stages do not ascend to the pruner's sparsity, or as :meth:`StructuredPruner.prune` does; what
            earlier stages removed stays removed.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> results = shrink_iteratively(net, StructuredPruner(0.5, torch.zeros(1, 4)), 2, lambda model: None)
        >>> [result.units["0"] for result in results], net[0].out_features
        ([(16, 12), (12, 8)], 8)
    """
    final = _one_sparsity(pruner)
    sparsities = _equal_steps(final, stages) if isinstance(stages, int) else list(stages)
    if not sparsities or sparsities[-1] != final or sorted(set(sparsities)) != sparsities:
        raise ValueError(f"stages must ascend to the pruner's sparsity {final!r}, got {stages!r}")
    finetune = of_model_and_stage(finetune_fn)
    before = Before.of(model, pruner)
    results: list[StructuredResult] = []
    for stage, sparsity in enumerate(sparsities, start=1):
        if results:
            results[-1].forget()
        results.append(before.prune(model, pruner, sparsity, optimizer))
        finetune(model, stage)
    return results


def _one_sparsity(pruner: StructuredPruner | BlockPruner) -> float:
    if not isinstance(pruner.sparsity, (int, float)):
        raise ValueError("steps lead to one sparsity; the pruner has one per layer")
    return pruner.sparsity


def _equal_steps(final: float, stages: int) -> list[float]:
    return [final * k / stages for k in range(1, stages)] + [final] * (stages > 0)  # 0.1 · 3 / 3 is not 0.1


@dataclass
class Before:
    """The model as it was, as far as later sparsities are a fraction of it."""

    units: dict[str, int]
    dense: nn.Module | float | None

    @staticmethod
    def of(model: nn.Module, pruner: StructuredPruner | BlockPruner) -> Before:
        units = pruner.units(model)
        dense: nn.Module | float | None = None
        if pruner.target == "parameters":
            dense = float(count_parameters(model))
        elif pruner.target == "macs":
            dense = float(count_macs(model, pruner.example_inputs))
        elif pruner.target == "latency":
            dense = plain_copy(model)
        return Before(units, dense)

    def prune(
        self, model: nn.Module, pruner: StructuredPruner | BlockPruner, sparsity: float, optimizer: Optimizer | None
    ) -> StructuredResult:
        return pruner.prune(model, optimizer, sparsity=sparsity, original=self.units, dense=self.dense)


@dataclass
class GradualShrinker:
    """Removes a little more every ``frequency`` steps, along the cubic ramp of Zhu & Gupta (arXiv 1710.01878, eq. 1).

    Call :meth:`step` once per training step, after ``optimizer.step()``. Where a model is compiled or wrapped
    (``DistributedDataParallel``), shrink the inner model and wrap it anew: its parameters are new objects.

    Args:
        pruner: What to remove by; its sparsity is that of ``end_step``.
        optimizer: Follows each removal.
        begin_step: First step of the ramp.
        end_step: Last step of the ramp.
        frequency: Steps between removals.
        initial_sparsity: At ``begin_step``.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> optimizer = torch.optim.Adam(net.parameters())
        >>> gradual = GradualShrinker(StructuredPruner(0.5, torch.zeros(1, 4)), optimizer, end_step=4, frequency=2)
        >>> for _ in range(6):
        ...     optimizer.zero_grad()
        ...     net(torch.randn(8, 4)).square().mean().backward()
        ...     optimizer.step()
        ...     _ = gradual.step(net)
        >>> [result.units["0"] for result in gradual.results], net[0].out_features
        ([(16, 9), (9, 8)], 8)
    """

    pruner: StructuredPruner | BlockPruner
    optimizer: Optimizer | None = None
    begin_step: int = 0
    end_step: int = 1000
    frequency: int = 100
    initial_sparsity: float = 0.0
    results: list[StructuredResult] = field(default_factory=list, init=False)
    _now: int = field(default=-1, init=False)
    _before: Before | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        final = _one_sparsity(self.pruner)
        check_sparsity(self.initial_sparsity, "initial_sparsity")
        if self.initial_sparsity > final:
            raise ValueError(f"sparsity cannot fall from {self.initial_sparsity!r} to {final!r}: what is gone is gone")
        self._ramp = Cubic(self.initial_sparsity, final, self.begin_step, self.end_step)
        self._due = Every(self.frequency, self.begin_step, self.end_step)

    def step(self, model: nn.Module) -> StructuredResult | None:
        """Remove if a step of the ramp is due.

        Returns:
            What was done; None where nothing was due, or nothing more was to go.
        """
        self._now += 1
        if not self._due(self._now):
            return None
        if self._before is None:
            self._before = Before.of(model, self.pruner)
        sparsity: Any = self._ramp(self._now)
        if sparsity <= 0:
            return None
        result = self._before.prune(model, self.pruner, sparsity, self.optimizer)
        result.forget()
        if all(before == after for before, after in result.units.values()):
            return None
        self.results.append(result)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Where the ramp is, and the sizes that its sparsity is a fraction of; beside :func:`save_shrunk`'s model.

        Raises:
            ValueError: With a latency target, whose model of before is no plain value.
        """
        before = self._before
        if before is not None and isinstance(before.dense, nn.Module):
            raise ValueError("a ramp to a latency measures against the model of before, which is not saved in a state")
        return {
            "step": self._now,
            "units": None if before is None else dict(before.units),
            "dense": None if before is None else before.dense,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another left off, with its model (:func:`load_shrunk`) and its optimizer's state."""
        self._now = state["step"]
        self._before = None if state["units"] is None else Before(dict(state["units"]), state["dense"])
