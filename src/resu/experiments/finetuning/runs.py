"""The runs of a comparison: which are to do, and one of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from resu.experiments.finetuning.front import rate
from resu.experiments.finetuning.run import Row, run
from resu.experiments.finetuning.tasks import Task, load_task
from resu.experiments.finetuning.ways import KINDS, Way
from resu.experiments.rows import append

__all__ = ["Job", "jobs", "one"]

Job = tuple[str, Way, int, int, float, str, bool]


@cache
def _task(name: str, data: Path, folder: Path, device: str) -> Task:
    return load_task(name, data, folder, device)


def one(shared: tuple[Path, Path, Path, str], *job: object) -> None:
    """A run in a process of its own; its row goes out at once."""
    data, folder, csv, device = shared
    name, way, seed, steps, lr, part, measured = job
    assert isinstance(name, str)
    assert isinstance(way, Way)
    task = _task(name, data, folder, device)
    row = run(task, way, int(str(seed)), int(str(steps)), float(str(lr)), str(part), measured=bool(measured))
    append(csv, row)


def jobs(given: argparse.Namespace, done: Sequence[Row], rates: Sequence[Row]) -> list[Job]:
    """What there is to do and is not done yet."""
    known = {(row.task, row.kind, row.size, row.seed, row.part, row.lr) for row in done}
    chosen = {(row.task, row.kind, row.size, row.seed) for row in done if row.part == "test"}
    found: list[Job] = []
    for task in given.tasks:
        for kind in given.kinds:
            sizes = KINDS[kind].sizes_for(task) if given.sizes is None else tuple(given.sizes)
            if kind == "head" and task == "stories":
                continue  # it has none
            for size in sorted({min(sizes), max(sizes)}) if given.tune else sizes:
                way = Way(kind, size)
                if given.memory:
                    first = KINDS[kind].rates[0]  # of no account
                    if (task, kind, size, 0, "memory", first) not in known:
                        found.append((task, way, 0, 0, first, "memory", True))
                    continue
                if given.tune:
                    found += [
                        (task, way, 0, given.steps, lr, "dev", False)
                        for lr in KINDS[kind].rates
                        if (task, kind, size, 0, "dev", lr) not in known
                    ]
                    continue
                lr = rate(rates, task, way)
                if lr is None:
                    raise SystemExit(f"{kind} has no learning rate in {given.rates}; run with --tune first")
                found += [
                    (task, way, seed, given.steps, lr, "test", seed == given.seeds[0])
                    for seed in given.seeds
                    if (task, kind, size, seed) not in chosen
                ]
    return found
