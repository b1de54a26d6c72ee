"""Cycles with dormant θ: the whole run is one sparse training by the ``RESU`` algorithm, its target a staircase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from resu.core.mask import SparseMask
from resu.modules.base import RESUModule
from resu.training.algorithms.resu import RESU
from resu.training.config import RESUConfig
from resu.training.sparsifier import Sparsifier

__all__ = ["DormantPlan"]


@dataclass(frozen=True, kw_only=True)
class _Staircase(RESU):
    """``RESU`` whose target is ``stages[c]`` from step ``c * stage_steps`` on."""

    stages: tuple[float, ...] = ()
    stage_steps: int = 1

    def target(self, step: int) -> float:
        """The stair of the cycle that ``step`` ends."""
        return self.stages[min(max(0, step - 1) // self.stage_steps, len(self.stages) - 1)]

    def due(self, step: int) -> bool:
        """Every interval until the freeze; the stairs themselves are taken by the plan."""
        return step > 0 and super().due(step)


class DormantPlan:
    """Owns the driver of a dormant run: PRUNE at each cycle's first step, tournaments until the mask freezes.

    A cycle's phases are RESU (θ learns, beside the active weights) and, once the mask is frozen for the last
    ``freeze_fraction`` of the run, STABILIZE. The freeze comes after the last PRUNE at the earliest.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, layers: Mapping[str, RESUModule], config: RESUConfig
    ) -> None:
        self.layers, self.config = layers, config
        total = config.total_steps
        last_stair = (config.cycles - 1) * config.steps_per_cycle
        self.freeze_step = max(last_stair, total - round(total * config.freeze_fraction))
        targets = tuple(config.target(c) for c in range(config.cycles))
        for layer in layers.values():
            if layer.mask is not None:  # the driver holds the masks from here on
                layer.remove_mask()
        self.sparsifier = Sparsifier(
            model,
            optimizer,
            _Staircase(
                sparsity=targets[-1],
                interval=config.tournament_interval,
                end_step=self.freeze_step,
                gamma=config.theta_damping,
                initial_sparsity=None if len(set(targets)) == 1 else 0.0,
                stages=targets,
                stage_steps=config.steps_per_cycle,
            ),
            distribution=config.distribution,
            include=[f"{name}.weight" if name else "weight" for name in layers],
            seed=config.seed,
        )
        self._at_start: dict[str, SparseMask] = {}

    @property
    def sparsity(self) -> float:
        """Fraction of pruned weights now."""
        return self.sparsifier.sparsity

    def phases(self, cycle: int) -> tuple[tuple[str, int], ...]:
        """RESU until the freeze, STABILIZE after it."""
        begin = cycle * self.config.steps_per_cycle
        resu = max(0, min(self.config.steps_per_cycle, self.freeze_step - begin))
        return ("resu", resu), ("stabilize", self.config.steps_per_cycle - resu)

    def begin(self, cycle: int) -> None:
        """PRUNE: to the cycle's target, before its first step."""
        self.sparsifier.prune_to(self.config.target(cycle))
        self._at_start = self.sparsifier.masks

    def result(self) -> dict[str, float]:
        """Who came back between the cycle's first step and now."""
        before, now = self._at_start, self.sparsifier.masks
        resurrected = sum(int((now[n].mask & ~before[n].mask).sum()) for n in now)
        kept = sum(int((now[n].mask & before[n].mask).sum()) for n in now)
        pruned = sum(mask.n_pruned for mask in before.values())
        return {
            "n_resurrected": resurrected,
            "n_active_kept": kept,
            "resurrection_budget": 1.0,  # the tournament is open: all places are contested
            "resurrection_rate": resurrected / pruned if pruned else 0.0,
        }

    def finish(self) -> None:
        """Hand the final masks to the layers, which hold the zeros from now on."""
        for name, mask in self.sparsifier.commit().items():
            layer = self.layers[name.rpartition(".")[0]]
            if mask.n_pruned:
                layer.set_mask(mask)

    def state_dict(self) -> dict[str, Any]:
        """The driver's state and the masks the running cycle began with."""
        return {
            "sparsifier": self.sparsifier.state_dict(),
            "at_start": {n: mask.state_dict() for n, mask in self._at_start.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.sparsifier.load_state_dict(state["sparsifier"])
        self._at_start = {n: SparseMask.from_state_dict(mask) for n, mask in state["at_start"].items()}
