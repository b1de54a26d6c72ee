"""The runs of the table: one network of one quantity with one seed in one way, to a row."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Sequence

import torch

from resu.experiments.spinn.fields import FIELDS, Field, read_solution, relative_error, train_field
from resu.experiments.spinn.fitting import Recipe, fit, physics_rms
from resu.experiments.spinn.laws import law_for
from resu.experiments.spinn.neurons import remove_neurons
from resu.experiments.spinn.origins import far_origins, rolling_origins
from resu.experiments.spinn.recording import Prepared
from resu.experiments.spinn.recordings import load_recording
from resu.experiments.spinn.results import FieldRow, LeftOutRow, OriginRow, TwinRow
from resu.experiments.spinn.ridge import ridge, ridge_penalty
from resu.experiments.spinn.sparse import STAGES, TARGET, kept, prune_in_stages, resurrect
from resu.experiments.spinn.twin import HIDDEN, Twin, dense_network, score
from resu.pruning.magnitude_pruner import MagnitudePruner
from resu.pruning.stages import prune_iteratively

__all__ = [
    "RECIPES",
    "WAYS",
    "dense_twin",
    "field_rows",
    "leave_one_out",
    "origin_rows",
    "quantity_rows",
    "recipe_for",
    "ridge_rows",
]

#: Chosen on the training and validation parts alone (docs/spinn.md). Few steps: the output layer starts in closed form.
RECIPES = {
    "wear": Recipe(steps=60, tune=15, rate=3e-4, tune_rate=1e-4),
    "milling": Recipe(steps=60, tune=15, rate=3e-4, tune_rate=1e-4),
    "thermal": Recipe(steps=60, tune=20, rate=1e-3, tune_rate=3e-4, penalty=100.0, settle=True),
}
#: Without the law, where that is better with other settings.
PLAIN = {"thermal": Recipe(steps=60, tune=20, rate=1e-3, tune_rate=1e-3, penalty=1000.0)}


def recipe_for(quantity: str, *, physics: bool = True) -> Recipe:
    """Steps and rates for a quantity, with the law in the loss or without."""
    return RECIPES[quantity] if physics else PLAIN.get(quantity, RECIPES[quantity])


RIDGE_MORE = "ridge, on the validation part too"
WAYS = ("dense", "sparse", "structured", "RESU")


def dense_twin(data: Prepared, recipe: Recipe, seed: int, *, physics: bool, hidden: Sequence[int] = HIDDEN) -> Twin:
    """A trained dense twin."""
    torch.manual_seed(seed)
    network = dense_network(data.inputs.shape[1], data.targets.shape[1], hidden)
    law = law_for(data) if physics else None
    return fit(Twin(network, data.targets[data.train], law), data, recipe)


def quantity_rows(
    data: Prepared, recipe: Recipe, seed: int, *, physics: bool, hidden: Sequence[int] = HIDDEN
) -> tuple[list[TwinRow], dict[str, Twin]]:
    """All ways for one quantity, with or without physics; each smaller twin comes from the same dense one.

    Args:
        data: A recording with its split.
        recipe: Steps and rates.
        seed: Of everything random.
        physics: Whether the law is part of every loss.
        hidden: Widths of the dense network.

    Returns:
        Rows, and the twins by way.
    """
    found: list[TwinRow] = []
    began = time.process_time()
    dense = dense_twin(data, recipe, seed, physics=physics, hidden=hidden)
    full = kept(dense)

    def row(way: str, twin: Twin) -> None:
        nonlocal began
        predicted = twin.predict(data.inputs)
        terms = physics_rms(twin, data, data.test)
        told = "; ".join(f"{name} {rms:.4g} {unit}" for name, (rms, unit) in terms.items())
        if twin.law is not None:
            told += "; " + "; ".join(f"{name} = {value}" for name, value in twin.law.constants().items())
        left = kept(twin)
        found.append(
            TwinRow(
                *(data.recording.name, way, physics, seed),
                *(1 - left / full, left, _r2(predicted, data, data.test), _skill(predicted, data)),
                *(told or "no law", time.process_time() - began),
            )
        )
        began = time.process_time()

    row("dense", dense)
    sparse = copy.deepcopy(dense)
    torch.manual_seed(seed)
    prune_in_stages(sparse, data, recipe).release()
    row("sparse", sparse)
    torch.manual_seed(seed)
    structured, _ = remove_neurons(dense, data, recipe)
    row("structured", structured)
    torch.manual_seed(seed)
    resurrected = resurrect(dense, data, recipe, seed=seed)
    row("RESU", resurrected)
    return found, dict(zip(WAYS, (dense, sparse, structured, resurrected), strict=True))


def _r2(predicted: torch.Tensor, data: Prepared, rows: torch.Tensor) -> float:
    return score(predicted[rows], data.targets[rows])


def _skill(predicted: torch.Tensor, data: Prepared) -> float:
    rows = data.val if len(data.val) else data.train
    return score(predicted[rows], data.targets[rows], data.targets[data.train])


def ridge_rows(data: Prepared) -> list[TwinRow]:
    """Ridge on the same inputs: fitted on the training part, as networks are, and on the validation part too."""
    rows = []
    for way in ("ridge", RIDGE_MORE):
        began = time.process_time()
        penalty = ridge_penalty(data)
        predicted = ridge(data, penalty, also_validation=way != "ridge")
        count = (data.inputs.shape[1] + 1) * data.targets.shape[1]
        test, val = _r2(predicted, data, data.test), _skill(predicted, data)
        told, spent = f"penalty {penalty:g}", time.process_time() - began
        rows.append(TwinRow(data.recording.name, way, False, 0, 0.0, count, test, val, told, spent))
    return rows


def origin_rows(folder: str | os.PathLike[str], name: str, seed: int) -> list[OriginRow]:
    """Ridge and dense networks on the rolling origins of a split in time, which choices go by, and on far ones."""
    recording, found = load_recording(name, folder), []
    known = torch.tensor(recording.targets[recording.rows([*recording.parts[0], *recording.parts[1]])])
    penalty = ridge_penalty(recording.prepare())

    def judge(split: Prepared, way: str, physics: bool) -> float:
        if way == "ridge":
            predicted = ridge(split, penalty)
        else:
            twin = dense_twin(split, recipe_for(name, physics=physics), seed, physics=physics)
            predicted = twin.predict(split.inputs)
        return score(predicted[split.test], split.targets[split.test], known)

    for way, physics in (("ridge", False), ("dense", False), ("dense", True)):
        if way == "ridge" and seed:
            continue
        began = time.process_time()
        near, far = (
            tuple(judge(split, way, physics) for split in splits)
            for splits in (rolling_origins(recording), far_origins(recording))
        )
        found.append(OriginRow(name, way, physics, seed, near, far, time.process_time() - began))
    return found


def leave_one_out(folder: str | os.PathLike[str], name: str, group: int, recipe: Recipe) -> list[LeftOutRow]:
    """Ridge, dense and sparse twin tested on one group that they do not know."""
    recording = load_recording(name, folder)
    data = recording.without([group])
    rows = []
    for way in ("ridge", "dense", "sparse"):
        began = time.process_time()
        if way == "ridge":
            predicted, parameters = ridge(data, ridge_penalty(data)), data.inputs.shape[1] + 1
        elif way == "dense":
            dense = dense_twin(data, recipe, 0, physics=True)
            predicted, parameters = dense.predict(data.inputs), kept(dense)
        else:
            prune_in_stages(dense, data, recipe).release()
            predicted, parameters = dense.predict(data.inputs), kept(dense)
        error = predicted[data.test] - data.targets[data.test]
        spread = float(data.targets[data.test].var())
        test = _r2(predicted, data, data.test) if spread > 0 else float("nan")
        rows.append(
            LeftOutRow(
                *(name, way, group, parameters, test, float(error.double().square().sum()), len(data.test)),
                *(float(error.mean()), float(error.abs().mean()), time.process_time() - began),
            )
        )
    return rows


def field_rows(
    folder: str | os.PathLike[str], name: str, seed: int, *, adam: int, lbfgs: int, rows: int = 1024
) -> list[FieldRow]:
    """The equation's solution by a dense field and by one with 70 % of its weights gone, against the reference."""
    equation = FIELDS[name]
    solution = read_solution(equation, folder)
    torch.manual_seed(seed)
    field, found = Field(equation), []
    began = time.process_time()
    train_field(field, adam=adam, lbfgs=lbfgs, rows=rows)

    def row(way: str) -> None:
        left = sum(int((p != 0).sum()) if p.ndim == 2 else p.numel() for p in field.parameters())
        full = sum(p.numel() for p in field.parameters())
        error = relative_error(field, solution)
        told = f"Adam {adam}, L-BFGS {lbfgs}, {rows} points"
        spent = time.process_time() - began
        found.append(FieldRow(name, way, seed, 1 - left / full, left, error, told, spent))

    row("dense")
    began = time.process_time()
    result = prune_iteratively(
        field,
        STAGES,
        lambda model: train_field(field, adam=0, lbfgs=max(1, lbfgs // 3), rows=rows),
        target=TARGET,
        pruner=MagnitudePruner(TARGET, include="network.*"),
    )
    result.release()
    row("sparse")
    return found
