"""What there is to run for the tables, and one run of it in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from resu.experiments.rows import append, read
from resu.experiments.spinn.new_tools import BY, LIVES, adaptation_rows, best_strength, strength_rows
from resu.experiments.spinn.recordings import load_recording
from resu.experiments.spinn.runs import (
    Row,
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
LAST = {
    **{"twin": "RESU", "field": "sparse", "origins": "dense"},
    **dict.fromkeys(("leave one out", "strength", "adaptation"), "sparse"),
}
Job = tuple[str, str, bool, int]
"""Study, quantity (or equation), physics, seed (or group)."""


def jobs(quantities: Sequence[str], fields: Sequence[str], seeds: int, done: Sequence[Row]) -> list[list[Job]]:
    """What there is to do and is not done yet, in two rounds: the second depends on the first."""
    known = {(r.study, r.quantity, r.physics, _number(r)) for r in done if r.way == LAST[r.study]}
    first: list[Job] = [("twin", name, True, seed) for seed in range(seeds) for name in quantities]
    first += [("field", name, True, 0) for name in fields]
    first += [
        ("origins", name, True, seed) for seed in range(min(seeds, 3)) for name in quantities if name == "thermal"
    ]
    first += [("strength", name, True, g) for name in LIVES if name in quantities for g in LIVES[name][:-1]]
    first += [("leave one out", name, True, g) for name in GROUPS if name in quantities for g in GROUPS[name]]
    first += [("twin", name, False, seed) for seed in range(seeds) for name in quantities]
    second: list[Job] = [("adaptation", name, True, g) for name in LIVES if name in quantities for g in LIVES[name]]
    return [[job for job in found if job not in known] for found in (first, second)]


def _number(row: Row) -> int:
    return int(row.group.split()[0]) if row.group else row.seed


def one(shared: tuple[Path, Path], *job: object) -> float:
    """One job in a process of its own; its rows go out at once. Returns the mean of what it measured."""
    folder, csv = shared
    study, name, physics, number = str(job[0]), str(job[1]), bool(job[2]), int(str(job[3]))
    rows: list[Row]
    if study == "field":
        rows = field_rows(folder, name, number, **FIELD_STEPS[name])
    elif study == "origins":
        rows = origin_rows(folder, name, number)
    elif study == "strength":
        rows = strength_rows(folder, name, number, recipe_for(name))
    elif study == "adaptation":
        done = read(csv, Row)
        strengths = [best_strength(done, name, number, by) for by in BY]
        rows = adaptation_rows(folder, name, number, recipe_for(name), strengths)
    elif study == "leave one out":
        rows = leave_one_out(folder, name, number, recipe_for(name))
    else:
        data = load_recording(name, folder).prepare()
        rows, _ = quantity_rows(data, recipe_for(name, physics=physics), number, physics=physics)
        if number == 0 and physics:
            rows = ridge_rows(data) + rows
    for row in rows:
        append(csv, row)
    return fmean(row.test for row in rows)
