"""The way through a model that repairs it block by block, and what a later run can continue of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from resu.core.layers import Layer
from resu.pruning.block_fit import Fit, Targets, fit_block, split_batches
from resu.pruning.blocks import Unit
from resu.pruning.inputs import padding_masks
from resu.pruning.layerwise import Activations, Step, Walk
from resu.pruning.lending import Lending
from resu.pruning.links import Slot
from resu.pruning.one_shot_files import OneShotFolder
from resu.pruning.repairs import KINDS, make_repair
from resu.pruning.trees import leaves

__all__ = ["TARGETS", "Plan", "Run", "check_pruned"]

TARGETS = ("dense", "sparse")


@dataclass(frozen=True)
class Plan:
    """How blocks are repaired; see :func:`resu.pruning.reconstruction.reconstruct`.

    Raises:
        ValueError: On an unknown name or a number that makes no sense.
    """

    train: str = "kept"
    targets: str = "dense"
    epochs: int = 10
    lr: float = 3e-2
    rank: int = 16
    alpha: float = 32.0
    held_out: float = 0.125
    seed: int = 0

    def __post_init__(self) -> None:
        if self.train not in KINDS:
            raise ValueError(f"train is {', '.join(map(repr, KINDS))}, got {self.train!r}")
        if self.targets not in TARGETS:
            raise ValueError(f"targets is {', '.join(map(repr, TARGETS))}, got {self.targets!r}")
        if self.epochs < 1 or self.rank < 1:
            raise ValueError(f"epochs and rank must be 1 or more, got {self.epochs} and {self.rank}")
        if not 0 < self.lr < float("inf") or not 0 < self.alpha < float("inf"):
            raise ValueError(f"lr and alpha must be positive numbers, got {self.lr} and {self.alpha}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is a fraction of the calibration between 0 and 1, got {self.held_out}")


def check_pruned(name: str, weight: Tensor, mask: Tensor) -> None:
    """Make pruned positions +0.0, which they have to be already up to their sign.

    Raises:
        ValueError: If there is another value at a pruned position.
    """
    with torch.no_grad():
        pruned = ~mask.to(weight.device)
        if int(torch.count_nonzero(weight[pruned])):
            raise ValueError(
                f"{name!r} has values where its mask says pruned; apply the masks to the model first "
                "(resu.pruning.mask_ops.apply_masks_to_model), or give the masks it was pruned with"
            )
        weight.masked_fill_(pruned, 0)


@dataclass
class Run:
    """One reconstruction, checked.

    Attributes:
        layers: What is repaired.
        masks: Their masks.
        plan: How.
        teacher: Lends the model the dense weights.
        own: Lends the model its own weights where they lie on disk; else nothing.
        progress: Told ``(epochs done, of, what)``.
        blocks: What is said of each block that was repaired.
        skipped: ``{parameter: reason}``.
        folder: Where what is done is kept, or None.
    """

    layers: dict[str, Layer]
    masks: Mapping[str, Tensor]
    plan: Plan
    teacher: Lending
    own: Lending
    progress: Callable[[int, int, str], None] | None = None
    blocks: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    folder: OneShotFolder | None = None
    _told: int = 0
    _total: int = 0
    _started: float = field(default_factory=time.monotonic)

    def walk(self, walk: Walk) -> None:
        """Block after block; goes on where the folder's run was interrupted, if there is one."""
        count, plan, folder = len(walk.batches), self.plan, self.folder
        split = split_batches(count, plan.held_out, plan.seed)
        own: dict[str, tuple[str, ...]] = {unit.name: self._repaired(unit) for unit in walk.units}
        self._total = plan.epochs * sum(1 for names in own.values() if names)
        held: Activations = [{} for _ in walk.batches]
        dense: Activations = [{} for _ in walk.batches]
        done = 0
        if folder is not None:
            done = folder.done
            rows = {one["entry"]["name"]: one["entry"] for one in folder.body["layers"].values()}
            self.blocks = [rows[name] for name in folder.body["units"] if name in rows]
            self._told = plan.epochs * len(self.blocks)
            if (stored := folder.activations()) is not None:
                held, dense = stored[:count], stored[count:]
            if done < len(walk.units):
                self._catch_up(walk, walk.units[done], held, dense)
        for unit in walk.units[done:]:
            names = own[unit.name]
            outputs = None
            if unit.chain is not None and plan.targets == "dense":
                outputs = self._dense_outputs(walk, unit, dense)
            with self.own.lent(unit.name if unit.chain is not None else None):
                if unit.chain is not None:
                    with walk.at(unit, held) as step:
                        if names:
                            outputs = self._own_targets(walk, unit, step) if outputs is None else outputs
                            self.blocks.append(self._repair(walk, unit, names, step, outputs, split))
                del outputs
                if folder is not None:
                    mine = {name: self.layers[name] for name in names}
                    folder.add(
                        unit.name,
                        mine,
                        {name: self.masks[name] for name in names},
                        dict.fromkeys(names, self.blocks[-1] if names else None),
                        [],
                        [_made(one) for one in (*held, *dense)],
                        time.monotonic() - self._started,
                    )

    def _repaired(self, unit: Unit) -> tuple[str, ...]:
        """Which layers of a unit are trained; the others are said to be skipped."""
        names = []
        for name in unit.layers:
            away = [tie for tie in self.layers[name].ties if not tie.startswith(f"{unit.name}.")]
            if unit.chain is None:
                self.skipped[name] = "outside of blocks"
            elif away:
                self.skipped[name] = f"shared with {away[0]}"
            else:
                names.append(name)
        return tuple(names)

    def _catch_up(self, walk: Walk, unit: Unit, held: Activations, dense: Activations) -> None:
        with self.own.lent():
            walk.catch_up(unit, held)
        if self.plan.targets == "dense":
            with self.teacher.lent():
                walk.catch_up(unit, dense)

    def _dense_outputs(self, walk: Walk, unit: Unit, dense: Activations) -> list[Tensor]:
        """``f_dense(x)`` on the dense path; ``dense`` moves on."""
        found = []
        with self.teacher.lent(unit.name), walk.at(unit, dense) as step:
            for i in range(len(walk.batches)):
                output = step.run(i)
                step.keep(i, output)
                found.append(walk.waiting(dense[i], unit, *_main(output)))
        return found

    def _own_targets(self, walk: Walk, unit: Unit, step: Step) -> list[Tensor]:
        """``f_dense(x̂)`` on what the repaired blocks give."""
        weights = {name: x.to(walk.placement.device) for name, x in self.teacher.weights(unit.name).items()}
        found = []
        for i in range(len(walk.batches)):
            path, output = _main(step.run(i, weights))
            found.append(walk.waiting({}, unit, path, output))
        return found

    def _repair(
        self,
        walk: Walk,
        unit: Unit,
        names: Sequence[str],
        step: Step,
        outputs: list[Tensor],
        split: tuple[list[int], list[int]],
    ) -> dict[str, Any]:
        began, plan = time.monotonic(), self.plan
        repairs = {}
        for name in names:
            layer = self.layers[name]
            mask = self.masks[name].to(layer.weight.device)
            check_pruned(name, layer.weight, mask)
            inside = name.removeprefix(f"{unit.name}.")
            repairs[inside] = make_repair(plan.train, layer, mask, rank=plan.rank, alpha=plan.alpha, seed=plan.seed)
        tokens = [
            next((m for m in padding_masks(batch).values() if m.shape == out.shape[: m.ndim]), None)
            for batch, out in zip(walk.batches, outputs, strict=True)
        ]

        def told(epoch: int, error: float) -> None:
            self._told += epoch > 0
            if self.progress is not None and epoch:
                self.progress(self._told, self._total, f"{unit.name}: error {error:.3g}")

        fit = fit_block(
            unit.name,
            repairs,
            lambda i, weights: _main(step.run(i, weights))[1],
            Targets(outputs, tokens),
            split,
            epochs=plan.epochs,
            lr=plan.lr,
            seed=plan.seed,
            told=told,
        )
        if fit.epoch:
            for inside, repair in repairs.items():
                with torch.no_grad():
                    self.layers[f"{unit.name}.{inside}"].weight.copy_(repair.weight())
        trained = sum(t.numel() for repair in repairs.values() for t in repair.trained)
        return _row(unit, names, fit, trained, time.monotonic() - began)


def _row(unit: Unit, names: Sequence[str], fit: Fit, trained: int, seconds: float) -> dict[str, Any]:
    return {
        "name": unit.name,
        "layers": list(names),
        "trained": trained,
        "before": fit.before,
        "after": fit.after,
        "epoch": fit.epoch,
        "errors": [error if math.isfinite(error) else None for error in fit.history],  # JSON knows no infinity
        "seconds": round(seconds, 3),
    }


def _made(held: Mapping[Slot, Any]) -> dict[Slot, Any]:
    return {slot: x for slot, x in held.items() if slot.kind == "out"}


def _main(output: Any) -> tuple[Any, Tensor]:
    """The hidden states among what a block gives, with their path: the first floating tensor."""
    for path, x in leaves(output):
        if isinstance(x, Tensor) and x.is_floating_point():
            return path, x
    raise ValueError("a block gives no floating tensor, so there is nothing to reconstruct; name other blocks")
