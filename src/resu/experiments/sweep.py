"""Many training runs from one file: a base configuration, and a grid of what differs.

``python -m resu.experiments.sweep GRID.yaml --out runs --jobs 2``. Each run is a process of its own with one thread and
a folder of its own; a run that fails leaves ``error.txt`` there and stops no other. What is finished is not run again,
and what was stopped goes on from its checkpoint: the same command again does the rest. Elsewhere ``--rows rows.csv``
says what is there already, in the rows that ``resu leaderboard`` wrote.

A grid file::

    base: mlp.yaml                     # beside the grid, or a mapping
    set: {steps: 4000}                 # of every run
    grid:                              # or a list of grids
      method: [static, rigl, {name: rigl, interval: 50, label: rigl-50}]
      method.sparsity: [0.8, 0.9]
      seed: [0, 1, 2]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resu.experiments.rows import read
from resu.experiments.train import Config, ConfigError, Result, as_config
from resu.experiments.train.folder import RESULT
from resu.experiments.train.reading import put, read_mapping
from resu.experiments.train.result import recipe_of
from resu.experiments.train.typed import coerce, plain, unknown_key

__all__ = ["Planned", "plan", "sweep", "without"]


@dataclass(frozen=True)
class Planned:
    """One run of a sweep: its configuration, and the name of its folder."""

    name: str
    config: Config


def plan(path: str | Path) -> list[Planned]:
    """The runs of a grid file in order; two that are the same are one (``dense`` has no sparsity).

    Raises:
        ConfigError: If the file, or the configuration of any run, cannot be meant.
    """
    path = Path(path)
    values = read_mapping(path)
    known = {"base": Any, "set": dict[str, Any], "grid": Any}
    for key in values:
        if key not in known:
            raise unknown_key(key, known, str(path))
    base = values.get("base", {})
    if isinstance(base, str):
        base = read_mapping(path.parent / base)
    for key, value in coerce(values.get("set", {}), Mapping[str, Any], "set").items():
        base = put(base, key, value)
    grids = values.get("grid", {})
    found: dict[str, Planned] = {}
    for grid in grids if isinstance(grids, list) else [grids]:
        for run in _runs(coerce(base, Mapping[str, Any], "base"), coerce(grid, Mapping[str, Any], "grid")):
            found.setdefault(json.dumps(plain(run.config), sort_keys=True), run)
    names = [run.name for run in found.values()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"different runs of {path} have the same name {twice[0]!r}; give their methods a label")
    return list(found.values())


def _runs(base: Mapping[str, Any], grid: Mapping[str, Any]) -> Iterator[Planned]:
    choices = [value if isinstance(value, list) else [value] for value in grid.values()]
    for chosen in itertools.product(*choices):
        values = dict(base)
        for key, value in zip(grid, chosen, strict=True):
            values = put(values, key, value)
        config = as_config(values)
        yield Planned(_name(config, grid), config)


def _name(config: Config, grid: Mapping[str, Any]) -> str:
    """A folder for a run: what of the grid it has, from its configuration."""
    values = plain(config)
    parts = []
    for key in grid:
        value: Any = values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if key in ("method", "method.name"):
            parts.append(config.method.label or config.method.name)
        elif isinstance(value, Mapping):
            parts.append(str(value.get("name")))
        else:
            parts.append(f"{key.rpartition('.')[2]}={value}")
    return ",".join(parts).replace("/", "_").replace(" ", "") or "run"


def without(runs: list[Planned], rows: Iterable[Result]) -> list[Planned]:
    """The runs that have no row yet: of the same data, model, method, sparsity, seed, regime, length and recipe.

    What a method did is not compared: remove rows of older settings to have them run again.
    """
    done = {(*_key(row), steps) for row in rows for steps in (row.steps, None)}  # None: given as epochs
    return [run for run in runs if (*_key_of(run.config), run.config.steps) not in done]


def _key(row: Result) -> tuple[object, ...]:
    return row.data, row.model, row.method, row.sparsity, row.seed, row.regime, row.recipe


def _key_of(config: Config) -> tuple[object, ...]:
    method = config.method
    name = method.label or method.name
    return config.data.name, config.model.name, name, method.sparsity, config.seed, config.regime, recipe_of(config)


def sweep(runs: list[Planned], out: str | Path, jobs: int = 1, threads: int = 1) -> dict[str, str]:
    """Carry out runs, ``jobs`` at a time, and print a line at the end of each.

    Args:
        runs: See :func:`plan`.
        out: The folder of their folders.
        jobs: Processes.
        threads: Of each process.

    Returns:
        ``{name: what went wrong}`` of those that failed.
    """
    out = Path(out)
    left = [run for run in runs if not (out / run.name / RESULT).is_file()]
    print(f"{len(runs)} runs, {len(runs) - len(left)} finished before", flush=True)
    failed: dict[str, str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(_process, run, out / run.name, threads): run for run in left}
        try:
            for count, future in enumerate(as_completed(futures), start=1):
                name, (code, text) = futures[future].name, future.result()
                print(f"[{count}/{len(left)}] {name}: {text}", flush=True)
                if code:
                    failed[name] = text
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)  # the runs have heard it too, and write their checkpoints
            raise
    return failed


def _process(run: Planned, folder: Path, threads: int) -> tuple[int, str]:
    """One run in a process of its own: exit code, and the last line it had to say."""
    folder.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-m", "resu.experiments.train", str(folder)],
        input=json.dumps(plain(run.config)),
        env=env,
        capture_output=True,
        text=True,
    )
    error = folder / "error.txt"
    if done.returncode == 0:
        error.unlink(missing_ok=True)
        return 0, done.stdout.strip().rpartition("\n")[2]
    error.write_text(done.stderr, encoding="utf-8")
    last = done.stderr.strip().rpartition("\n")[2]
    return done.returncode, f"failed: {last or f'ended by signal {-done.returncode}'}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m resu.experiments.sweep", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("grid", type=Path, help="YAML or JSON with base, set and grid")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs' folders")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--rows", type=Path, help="CSV of rows of runs that need not run again")
    parser.add_argument("--list", action="store_true", help="name the runs and leave")
    given = parser.parse_args()
    try:
        runs = plan(given.grid)
        if given.rows is not None:
            runs = without(runs, read(given.rows, Result))
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"sweep: {error}\n")
    if given.list:
        print("\n".join(run.name for run in runs))
        return
    try:
        failed = sweep(runs, given.out, max(1, given.jobs), max(1, given.threads))
    except KeyboardInterrupt:
        parser.exit(130, "sweep: interrupted; the same command goes on\n")
    if failed:
        parser.exit(1, f"sweep: {len(failed)} of {len(runs)} runs failed; error.txt in their folders says why\n")


if __name__ == "__main__":
    main()
