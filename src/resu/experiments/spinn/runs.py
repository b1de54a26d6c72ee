"""The runs of the table: one network of one quantity with one seed in one way, to a row."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from resu.experiments.rows import append
from resu.experiments.spinn.adaptation import compare_adaptation
from resu.experiments.spinn.fields import FIELDS, Field, read_solution, relative_error, train_field
from resu.experiments.spinn.fitting import Recipe, fit, physics_rms
from resu.experiments.spinn.laws import law_for
from resu.experiments.spinn.neurons import remove_neurons
from resu.experiments.spinn.recording import Prepared
from resu.experiments.spinn.recordings import load_recording
from resu.experiments.spinn.ridge import ridge
from resu.experiments.spinn.sparse import STAGES, TARGET, kept, prune_in_stages, resurrect
from resu.experiments.spinn.twin import HIDDEN, Twin, dense_network, score
from resu.pruning.magnitude_pruner import MagnitudePruner
from resu.pruning.stages import prune_iteratively

__all__ = ["RECIPES", "WAYS", "Row", "dense_twin", "field_rows", "jobs", "leave_one_out", "one", "quantity_rows"]

#: Chosen on the training and validation parts alone (docs/spinn.md). Few steps: the output layer starts in closed form.
RECIPES = {
    "wear": Recipe(steps=60, tune=15, rate=3e-4, tune_rate=1e-4),
    "milling": Recipe(steps=60, tune=15, rate=3e-4, tune_rate=1e-4),
    "thermal": Recipe(steps=150, tune=40, rate=1e-3, tune_rate=1e-3),
}
FIELD_STEPS = {"burgers": {"adam": 300, "lbfgs": 900}, "allen-cahn": {"adam": 600, "lbfgs": 600}}
RIDGE_MORE = "ridge, on the validation part too"
WAYS = ("dense", "sparse", "structured", "RESU")


@dataclass(frozen=True)
class Row:
    """One measured number or network.

    Attributes:
        study: ``"twin"``, ``"leave one out"``, ``"adaptation"`` or ``"field"``.
        quantity: Recording or equation.
        way: ``"ridge"`` or one of :data:`WAYS`.
        physics: Whether the law was part of the loss.
        seed: Of everything random.
        group: The tool or case left out or adapted to; else empty.
        sparsity: Fraction of the dense network's parameters that is gone.
        parameters: That are left.
        test: R² on held-out rows; for a field the relative L2 error; for adaptation the share of gain recovered.
        val: R² on the validation part, against the variance of the training part.
        detail: The rest as text.
        seconds: Processor time.
    """

    study: str
    quantity: str
    way: str
    physics: bool
    seed: int
    group: str
    sparsity: float
    parameters: int
    test: float
    val: float
    detail: str
    seconds: float


def dense_twin(data: Prepared, recipe: Recipe, seed: int, *, physics: bool, hidden: Sequence[int] = HIDDEN) -> Twin:
    """A trained dense twin."""
    torch.manual_seed(seed)
    network = dense_network(data.inputs.shape[1], data.targets.shape[1], hidden)
    law = law_for(data) if physics else None
    return fit(Twin(network, data.targets[data.train], law), data, recipe)


def quantity_rows(
    data: Prepared, recipe: Recipe, seed: int, *, physics: bool, hidden: Sequence[int] = HIDDEN
) -> tuple[list[Row], dict[str, Twin]]:
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
    found: list[Row] = []
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
            Row(
                *("twin", data.recording.name, way, physics, seed, ""),
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


def ridge_rows(data: Prepared) -> list[Row]:
    """Ridge on the same inputs: fitted on the training part, as networks are, and on the validation part too."""
    rows = []
    for way in ("ridge", RIDGE_MORE):
        began = time.process_time()
        predicted, penalty = ridge(data, also_validation=way != "ridge")
        count = (data.inputs.shape[1] + 1) * data.targets.shape[1]
        test, val = _r2(predicted, data, data.test), _skill(predicted, data)
        told, spent = f"penalty {penalty:g}", time.process_time() - began
        rows.append(Row("twin", data.recording.name, way, False, 0, "", 0.0, count, test, val, told, spent))
    return rows


def adaptation_rows(folder: str | os.PathLike[str], name: str, seed: int, recipe: Recipe) -> list[Row]:
    """Adaptation of the sparse twin to each group of the test part, on the first 30 % of its life."""
    data, found = load_recording(name, folder).prepare(), []
    twin = dense_twin(data, recipe, seed, physics=True)
    prune_in_stages(twin, data, recipe).release()
    for group in data.recording.parts[2]:
        if len(set(data.recording.time[data.recording.rows([group])])) < 4:
            continue  # too short a life to have a first part
        began = time.process_time()
        result = compare_adaptation(twin, data, group, recipe, seed=seed)
        told = (
            f"RMSE {data.recording.unit}: before {result.before:.4g}, adapted {result.adapted:.4g}, retrained "
            f"{result.retrained:.4g}; multiply-adds {result.cost:.4f}, processor time {result.seconds:.4f}"
        )
        found.append(
            Row(
                *("adaptation", name, "sparse", True, seed, str(group), TARGET, kept(twin)),
                *(result.recovered, float("nan"), told, time.process_time() - began),
            )
        )
    return found


def leave_one_out(folder: str | os.PathLike[str], name: str, group: int, recipe: Recipe) -> list[Row]:
    """Ridge, dense and sparse twin tested on one group; all others train or, where they do anyway, validate."""
    recording = load_recording(name, folder)
    val = tuple(g for g in recording.parts[1] if g != group)
    data = recording.prepare((tuple(g for g in recording.groups() if g != group and g not in val), val, (group,)))
    rows = []
    for way in ("ridge", "dense", "sparse"):
        began = time.process_time()
        if way == "ridge":
            predicted, parameters = ridge(data)[0], data.inputs.shape[1] + 1
        elif way == "dense":
            dense = dense_twin(data, recipe, 0, physics=True)
            predicted, parameters = dense.predict(data.inputs), kept(dense)
        else:
            prune_in_stages(dense, data, recipe).release()
            predicted, parameters = dense.predict(data.inputs), kept(dense)
        error = predicted[data.test] - data.targets[data.test]
        told = (
            f"squared error {float(error.double().square().sum()):.6g} over {len(data.test)} rows; mean error "
            f"{float(error.mean()):.4g}; mean absolute error {float(error.abs().mean()):.4g} {recording.unit}"
        )
        spread = float(data.targets[data.test].var())
        test = _r2(predicted, data, data.test) if spread > 0 else float("nan")
        rows.append(
            Row(
                *("leave one out", name, way, way != "ridge", 0, str(group), 0.7 if way == "sparse" else 0.0),
                *(parameters, test, float("nan"), told, time.process_time() - began),
            )
        )
    return rows


def field_rows(
    folder: str | os.PathLike[str], name: str, seed: int, *, adam: int, lbfgs: int, rows: int = 1024
) -> list[Row]:
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
        found.append(Row("field", name, way, True, seed, "", 1 - left / full, left, error, float("nan"), told, spent))

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


Job = tuple[str, str, bool, int]
"""Study, quantity (or equation), physics, seed (or group)."""


def jobs(quantities: Sequence[str], fields: Sequence[str], seeds: int, done: Sequence[Row]) -> list[Job]:
    """What there is to do and is not done yet; what the most depends on comes first."""
    last = {"twin": "RESU", "field": "sparse", "leave one out": "sparse", "adaptation": "sparse"}
    known = {
        (r.study, r.quantity, r.physics, int(r.group) if r.study == "leave one out" else r.seed)
        for r in done
        if r.way == last[r.study]
    }
    groups = {"wear": (3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16), "milling": tuple(range(1, 17))}
    found: list[Job] = [("twin", name, True, seed) for seed in range(seeds) for name in quantities]
    found += [("field", name, True, 0) for name in fields]
    found += [
        ("adaptation", name, True, seed) for seed in range(min(seeds, 3)) for name in groups if name in quantities
    ]
    found += [("leave one out", name, True, g) for name in ("wear",) if name in quantities for g in groups[name]]
    found += [("twin", name, False, seed) for seed in range(seeds) for name in quantities]
    found += [("leave one out", name, True, g) for name in ("milling",) if name in quantities for g in groups[name]]
    return [job for job in found if job not in known]


def one(shared: tuple[Path, Path], *job: object) -> float:
    """One job in a process of its own; its rows go out at once. Returns the mean of what it measured."""
    folder, csv = shared
    study, name, physics, number = str(job[0]), str(job[1]), bool(job[2]), int(str(job[3]))
    rows: list[Row]
    if study == "field":
        rows = field_rows(folder, name, number, **FIELD_STEPS[name])
    elif study == "adaptation":
        rows = adaptation_rows(folder, name, number, RECIPES[name])
    elif study == "leave one out":
        rows = leave_one_out(folder, name, number, RECIPES[name])
    else:
        data, recipe = load_recording(name, folder).prepare(), RECIPES[name]
        rows, _ = quantity_rows(data, recipe, number, physics=physics)
        if number == 0 and physics:
            rows = ridge_rows(data) + rows
    for row in rows:
        append(csv, row)
    return fmean(row.test for row in rows)
