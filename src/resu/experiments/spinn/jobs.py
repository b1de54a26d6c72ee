"""What there is to run for the tables, and one run of it in a process of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from resu.experiments.spinn.new_tools import LIVES, SEEDS, known_tool_rows, new_tool_rows
from resu.experiments.spinn.recordings import load_recording
from resu.experiments.spinn.results import AnyRow, Results, add
from resu.experiments.spinn.runs import (
    WAYS,
    field_rows,
    leave_one_out,
    origin_rows,
    quantity_rows,
    recipe_for,
    ridge_rows,
)

__all__ = ["Job", "jobs", "one"]

FIELD_STEPS = {"burgers": {"adam": 300, "lbfgs": 900}, "allen-cahn": {"adam": 600, "lbfgs": 600}}
GROUPS = {"wear": LIVES["wear"], "milling": tuple(range(1, 17))}


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        study: As the attributes of :class:`~resu.experiments.spinn.results.Results`.
        quantity: Recording or equation.
        number: Seed, or the group that is left out or new.
        physics: Whether the law is part of the loss.
    """

    study: str
    quantity: str
    number: int
    physics: bool = True

    def __str__(self) -> str:
        return f"{self.study} {self.quantity} {self.number}{'' if self.physics else ', without physics'}"


def jobs(quantities: Sequence[str], fields: Sequence[str], seeds: int, done: Results) -> list[list[Job]]:
    """What there is to do and is not done yet, in two rounds: the second depends on the first."""
    first = [Job("twins", name, seed) for seed in range(seeds) for name in quantities]
    first += [Job("fields", name, 0) for name in fields]
    first += [Job("origins", name, seed) for seed in range(min(seeds, 3)) for name in quantities if name == "thermal"]
    first += [Job("known_tools", name, g) for name in LIVES if name in quantities for g in LIVES[name][:-1]]
    first += [Job("left_out", name, g) for name in GROUPS if name in quantities for g in GROUPS[name]]
    first += [Job("twins", name, seed, False) for seed in range(seeds) for name in quantities]
    second = [Job("new_tools", name, g) for name in LIVES if name in quantities for g in LIVES[name]]
    known = set(_ended(done))
    return [[job for job in found if job not in known] for found in (first, second)]


def _ended(done: Results) -> Iterable[Job]:
    """Jobs whose last row is there."""
    for twin in done.twins:
        if twin.way == WAYS[-1]:
            yield Job("twins", twin.quantity, twin.seed, twin.physics)
    yield from (Job("fields", row.quantity, row.seed) for row in done.fields if row.way == "sparse")
    yield from (Job("origins", row.quantity, row.seed) for row in done.origins if row.physics)
    yield from (Job("left_out", row.quantity, row.group) for row in done.left_out if row.way == "sparse")
    pairs = {(row.quantity, row.other, row.group) for row in done.known_tools}
    for name, lives in LIVES.items():
        for k, group in enumerate(lives):
            if all((name, group, other) in pairs for other in lives[k + 1 :]):
                yield Job("known_tools", name, group)
    yield from (Job("new_tools", row.quantity, row.group) for row in done.new_tools if row.seed == SEEDS - 1)


def one(shared: tuple[Path, Path], job: Job) -> None:
    """One job in a process of its own; its rows are added when all are there."""
    folder, results = shared
    for row in _rows(folder, results, job):
        add(results, row)


def _rows(folder: Path, results: Path, job: Job) -> Sequence[AnyRow]:
    name, number = job.quantity, job.number
    if job.study == "fields":
        return field_rows(folder, name, number, **FIELD_STEPS[name])
    if job.study == "origins":
        return origin_rows(folder, name, number)
    if job.study == "known_tools":
        return known_tool_rows(folder, name, number, recipe_for(name))
    if job.study == "new_tools":
        return new_tool_rows(folder, name, number, recipe_for(name), Results.read(results).known_tools)
    if job.study == "left_out":
        return leave_one_out(folder, name, number, recipe_for(name))
    data = load_recording(name, folder).prepare()
    rows, _ = quantity_rows(data, recipe_for(name, physics=job.physics), number, physics=job.physics)
    return ridge_rows(data) + rows if number == 0 and job.physics else rows
