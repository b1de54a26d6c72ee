"""Resurrection cycles: TRAIN → PRUNE → STABILIZE → RESU → COMMIT, again and again."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from resu.pruning.importance import importances
from resu.training.phases import commit_layers, enter_layers, prune_layers, sparsity_of

if TYPE_CHECKING:
    from resu.training.trainer import RESUTrainer

__all__ = ["CycleStats", "RESUCycle", "RESUTrainer"]

_CAPTURE = 32  # optimizer steps whose inputs a Wanda score looks at


@dataclass(frozen=True)
class CycleStats:
    """What one cycle did. Rates are shares of the positions pruned at its PRUNE."""

    cycle: int
    target_sparsity: float
    actual_sparsity: float
    train_loss: float
    eval: float | None
    train_steps: int
    resu_steps: int
    n_resurrected: int
    n_active_kept: int
    resurrection_budget: float
    resurrection_rate: float
    mean_consistency: float
    mean_selection_ratio: float
    duration_seconds: float


class RESUCycle:
    """One cycle as a machine that is fed batches; :class:`RESUTrainer` runs many.

    Args:
        trainer: Holds the model, the optimizer and the settings.
        cycle: Its number, from 0.
    """

    def __init__(self, trainer: RESUTrainer, cycle: int) -> None:
        self.trainer = trainer
        self.cycle = cycle
        self.target = trainer.config.target(cycle)
        train, stabilize, resu = trainer.config.phase_steps()
        self.plan: tuple[tuple[str, int], ...] = (("train", train), ("stabilize", stabilize), ("resu", resu))
        if trainer.dormant is not None:
            self.plan = trainer.dormant.phases(cycle)
        self.position = 0
        self.done = 0
        self.sums = {
            "loss": 0.0,
            "train": 0.0,
            "resu": 0.0,
            "consistency": 0.0,
            "selected": 0.0,
            "updates": 0.0,
        }
        self.theta_optimizer: Optimizer | None = None
        self.started = time.monotonic()

    @property
    def phase(self) -> str:
        """The phase of the next step: ``"train"``, ``"stabilize"``, ``"resu"``, or ``"done"`` after COMMIT."""
        return self.plan[self.position][0] if self.position < len(self.plan) else "done"

    def begin(self) -> None:
        """Start the first phase that has steps (a cycle that is fresh, not a resumed one)."""
        self.started = time.monotonic()
        if self.trainer.dormant is not None:
            self.trainer.dormant.begin(self.cycle)
        self._open()
        self._skip_finished()

    def advance(self) -> float:
        """One optimizer step of the present phase; returns its loss."""
        phase, trainer = self.phase, self.trainer
        self._capture(phase)
        loss = trainer.optimizer_step(self._stepper(), self._update_theta if phase == "resu" else None)
        self.done += 1
        self.sums["loss"] += loss
        self.sums["resu" if phase == "resu" else "train"] += 1
        self._skip_finished()
        return loss

    def _stepper(self) -> Optimizer | None:
        """What steps in the present phase: the θ optimizer, nothing (selective), or the user's optimizer."""
        active = any(layer.is_resu_active for layer in self.trainer.layers.values())
        return self.theta_optimizer if active else self.trainer.optimizer

    def _skip_finished(self) -> None:
        while self.position < len(self.plan) and self.done >= self.plan[self.position][1]:
            self._close()
            self.position, self.done = self.position + 1, 0
            self._open()

    # -- what happens at the borders of phases -----------------------------------------------------------
    def _open(self) -> None:
        trainer, phase = self.trainer, self.phase
        trainer.notify("phase", phase=phase, cycle=self.cycle)
        if trainer.dormant is not None:
            return
        if phase == "stabilize":
            self._prune()
            if trainer.stabilizer is not None:
                trainer.stabilizer(trainer)
        elif phase == "resu" and self.plan[self.position][1] > 0:
            self._enter()

    def _close(self) -> None:
        # Without a RESU phase there is no θ, and a tournament would readmit zeros.
        if self.trainer.dormant is None and self.phase == "resu" and self.plan[self.position][1] > 0:
            self._commit()

    def _prune(self) -> None:
        trainer = self.trainer
        if sparsity_of(trainer.layers) > self.target:  # densification grows at COMMIT
            return
        if trainer.pruner is not None:
            trainer.pruner(trainer, self.target)
        else:
            prune_layers(trainer.layers, self.target, trainer.config, trainer.optimizer, self.cycle)
        self._release_captures()

    def _enter(self) -> None:
        trainer, config = self.trainer, self.trainer.config
        if not config.freeze_active_during_resu:
            trainer.free_actives()
            return
        trainer.forget_gradients()
        enter_layers(trainer.layers, config, self.cycle)
        self.theta_optimizer = trainer.make_theta_optimizer()

    def _commit(self) -> None:
        trainer, config = self.trainer, self.trainer.config
        old = trainer.merge()
        if config.commit_strategy == "amnesty" and config.amnesty_score_type == "gradient":
            trainer.forget_gradients()
            trainer.backward(trainer.feed_last())  # ∂L/∂W of the merged weight, at active and pruned alike
        result = commit_layers(trainer.layers, old, self.target, config, trainer.optimizer, self.cycle)
        self.sums.update({key: float(value) for key, value in result.items()})
        self.theta_optimizer = None
        trainer.forget_gradients()
        self._release_captures()

    def _update_theta(self) -> None:
        """Selective updates that the layer makes itself, and their statistics."""
        if not self.trainer.config.use_selective:
            return
        for layer in self.trainer.layers.values():
            if not layer.is_resu_active:
                continue
            stats = layer.resu_step() if not layer.mode.quantized else layer.last_update
            self.sums["consistency"] += float(stats.get("mean_consistency", 0.0))
            self.sums["selected"] += float(stats.get("selection_ratio", 0.0))
            self.sums["updates"] += 1

    def _capture(self, phase: str) -> None:
        """Collect input norms in the last steps before they are needed."""
        config = self.trainer.config
        left = self.plan[self.position][1] - self.done
        scores = {"train": config.pruning_method, "resu": config.commit_score}.get(phase)
        wanted = scores is not None and "inputs" in importances[scores].needs
        if wanted and left <= _CAPTURE:
            for layer in self.trainer.layers.values():
                layer.capture_activations = True

    def _release_captures(self) -> None:
        for layer in self.trainer.layers.values():
            if layer.capture_activations:
                layer.capture_activations = False
                layer.reset_activations()

    # -- result and resume -------------------------------------------------------------------------------
    def stats(self, evaluation: float | None) -> CycleStats:
        """The record of the finished cycle."""
        trainer, sums = self.trainer, self.sums
        steps, updates = sums["train"] + sums["resu"], max(1.0, sums["updates"])
        if trainer.dormant is not None:
            sums.update(trainer.dormant.result())
        return CycleStats(
            cycle=self.cycle,
            target_sparsity=self.target,
            actual_sparsity=trainer.sparsity,
            train_loss=sums["loss"] / steps if steps else math.nan,
            eval=evaluation,
            train_steps=int(sums["train"]),
            resu_steps=int(sums["resu"]),
            n_resurrected=int(sums.get("n_resurrected", 0)),
            n_active_kept=int(sums.get("n_active_kept", 0)),
            resurrection_budget=sums.get("resurrection_budget", 0.0),
            resurrection_rate=sums.get("resurrection_rate", 0.0),
            mean_consistency=sums["consistency"] / updates,
            mean_selection_ratio=sums["selected"] / updates,
            duration_seconds=time.monotonic() - self.started,
        )

    def state_dict(self) -> dict[str, Any]:
        """Phase, position and running sums."""
        return {
            "cycle": self.cycle,
            "position": self.position,
            "done": self.done,
            "sums": dict(self.sums),
            "seconds": time.monotonic() - self.started,
            "captured": {n: sums for n, x in self.trainer.layers.items() if (sums := x.capture_state()) is not None},
            "theta_optimizer": None if self.theta_optimizer is None else self.theta_optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue; the model has been loaded already."""
        self.position, self.done, self.sums = state["position"], state["done"], dict(state["sums"])
        self.started = time.monotonic() - state["seconds"]
        for name, sums in state["captured"].items():
            self.trainer.layers[name].resume_capture(sums)
        if state["theta_optimizer"] is not None:
            self.theta_optimizer = self.trainer.make_theta_optimizer()
            assert self.theta_optimizer is not None
            self.theta_optimizer.load_state_dict(state["theta_optimizer"])


def __getattr__(name: str) -> Any:
    if name == "RESUTrainer":  # documented as resu.training.cycle.RESUTrainer
        from resu.training.trainer import RESUTrainer

        return RESUTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
