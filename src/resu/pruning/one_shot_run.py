"""The run behind ``prune_model``: budgets, then masks and weights, in one go or unit by unit with a checkpoint."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from resu.core.layers import Layer
from resu.pruning.blocks import Unit
from resu.pruning.budget import Budget
from resu.pruning.decisions import Decision, Recipe, apply_decision, decide, layer_scores
from resu.pruning.importance import importances
from resu.pruning.inputs import Inputs
from resu.pruning.layerwise import Activations, Walk
from resu.pruning.one_shot_files import OneShotFolder, weight_checksums
from resu.pruning.statistics import Stats, input_stats

__all__ = ["Job"]

Progress = Callable[[int, int, str], None]
_FROM_INPUTS = frozenset({"inputs", "hessian"})


@dataclass
class Job:
    """One call of ``prune_model``, checked.

    Attributes:
        model: The model.
        layers: What is pruned.
        recipe: How.
        budget: How much each layer keeps.
        grads: Gradients of the dense model, for scores that look at them.
        progress: Told ``(layers done, of, name)``.
        masks, entries, warnings: What comes out.
    """

    model: nn.Module
    layers: dict[str, Layer]
    recipe: Recipe
    budget: Budget
    grads: Mapping[str, Stats] = field(default_factory=dict)
    progress: Progress | None = None
    masks: dict[str, Tensor] = field(default_factory=dict)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    _homes: dict[str, torch.device] = field(default_factory=dict)
    _told: int = 0
    _total: int = 0
    _started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._homes = {name: layer.weight.device for name, layer in self.layers.items()}

    # -- budgets

    def _keeps(self, scores: Mapping[str, Tensor] | None) -> dict[str, int]:
        shapes = {name: layer.matrix(layer.weight).shape for name, layer in self.layers.items()}
        return self.budget.keeps(shapes, scores)

    def _stats(self, name: str) -> Stats:
        return self.grads.get(name, Stats())

    # -- in one go

    def at_once(self) -> None:
        """Scores that need no inputs, and no update: layer after layer."""
        self._total = len(self.layers) * (2 if self.budget.needs_scores else 1)
        keeps = self._keeps(self._scores_of_weights() if self.budget.needs_scores else None)
        for name, layer in self.layers.items():
            self._write({name: decide(self.recipe, layer, self._stats(name), keeps[name])})
            self._tell(name)

    def _scores_of_weights(self) -> dict[str, Tensor]:
        scores = {}
        for name, layer in self.layers.items():
            scores[name] = layer_scores(self.recipe, layer, self._stats(name))
            self._tell(f"{name}: scores")
        return scores

    # -- unit by unit

    def walk(self, walk: Walk, folder: OneShotFolder | None) -> None:
        """Block after block; see :mod:`resu.pruning.layerwise`."""
        early = not (_FROM_INPUTS & importances[self.recipe.method].needs)  # scores are those of the dense weights
        first = self.budget.needs_scores and not early
        self._total = len(self.layers) * (2 if first else 1)
        done, activations, decided = 0, None, None
        if folder is not None and folder.exists():
            folder.open(weight_checksums(self.model, self.layers))
            keeps, decided, activations = dict(folder.body["keeps"]), folder.decided(), folder.activations()
            self.masks |= folder.restore(self.layers)
            self.entries |= {name: one["entry"] for name, one in folder.body["layers"].items()}
            self.warnings += folder.body["warnings"]
            self._started -= folder.body["seconds"]
            done = folder.done
            self._told = len(self.layers) * (1 if first else 0) + len(self.masks)
        else:
            scores = None
            if self.budget.needs_scores:
                scores = self._scores_of_weights_quietly() if early else self._dense_scores(walk)
            keeps = self._keeps(scores)
            if early and self.recipe.needs:
                decided = {
                    n: self.recipe.pattern.select(
                        scores[n] if scores else layer_scores(self.recipe, layer, self._stats(n)), keeps[n]
                    )
                    for n, layer in self.layers.items()
                }
            del scores
            if folder is not None:
                folder.begin(weight_checksums(self.model, self.layers), keeps, decided)

        untold: list[str] = []

        def visit(unit: Unit, inputs: Inputs) -> None:
            decisions, told = {}, inputs.check()
            for name in unit.layers:
                stats = self._seen(name, inputs)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    mask = None if decided is None else decided[name]
                    decisions[name] = decide(self.recipe, self.layers[name], stats, keeps[name], mask)
                told += [f"{name!r}: {one.message}" for one in caught]
                inputs.forget(name)
                del stats
                self._tell(name)
            self._write(decisions)
            self.warnings += told
            untold.extend(told)

        def finished(number: int, held: Activations) -> None:
            if folder is not None:
                unit = walk.units[number - 1]
                own = {name: self.layers[name] for name in unit.layers}
                folder.add(
                    unit.name,
                    own,
                    {name: self.masks[name] for name in own},
                    {name: self.entries[name] for name in own},
                    self.warnings,
                    held,
                    time.monotonic() - self._started,
                )
            # Only now: where warnings are errors, the unit is done and stored all the same.
            while untold:
                warnings.warn(untold.pop(0), stacklevel=2)

        walk.go(self.recipe.needs & _FROM_INPUTS, visit, start=done, activations=activations, done=finished)

    def _scores_of_weights_quietly(self) -> dict[str, Tensor]:
        return {n: layer_scores(self.recipe, layer, self._stats(n)) for n, layer in self.layers.items()}

    def _dense_scores(self, walk: Walk) -> dict[str, Tensor]:
        """Scores of the dense model, kept in main memory: what a budget over all layers is divided by."""
        scores: dict[str, Tensor] = {}

        def visit(unit: Unit, inputs: Inputs) -> None:
            inputs.check()
            for name in unit.layers:
                scores[name] = layer_scores(self.recipe, self.layers[name], self._seen(name, inputs)).cpu()
                inputs.forget(name)
                self._tell(f"{name}: scores")

        walk.go(importances[self.recipe.method].needs & _FROM_INPUTS, visit, pruning=False)
        return {name: scores[name] for name in self.layers}

    def _seen(self, name: str, inputs: Inputs) -> Stats:
        needs = [n for n in ("inputs", "hessian") if getattr(inputs, f"has_{n}")]
        seen, slopes = input_stats(inputs, name, needs), self._stats(name)
        return replace(seen, grad=slopes.grad, grad_squared=slopes.grad_squared)

    # -- results

    def _write(self, decisions: Mapping[str, Decision]) -> None:
        """Change the layers of a unit, all of them or none."""
        before = {name: self.layers[name].weight.detach().clone() for name in decisions}
        masks = {}
        try:
            for name, decision in decisions.items():
                masks[name] = apply_decision(self.layers[name], decision)
        except BaseException:
            with torch.no_grad():
                for name, weight in before.items():
                    self.layers[name].weight.copy_(weight)
            raise
        for name, mask in masks.items():
            self.masks[name] = mask.to(self._homes[name])
            kept = int(mask.sum())
            self.entries[name] = {
                "name": name,
                "shape": list(mask.shape),
                "kept": kept,
                "numel": mask.numel(),
                "sparsity": 1 - kept / mask.numel(),
                **decisions[name].notes,
            }

    def _tell(self, what: str) -> None:
        self._told += 1
        if self.progress is not None:
            self.progress(self._told, self._total, what)
