"""The honest question: at equal cost and equal sparsity, which way of pruning is best?

``python -m resu.experiments.honest --task mlp --regime finetune --sparsities 0.9 0.95 --out results`` runs
what is not yet in ``results/honest_mlp_finetune.csv``; with ``--render page.md`` it writes tables and a plot.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from resu.core.counting import check_sparsity
from resu.experiments.data import DataError, Dataset
from resu.experiments.leaderboard import append_row, read_rows
from resu.experiments.methods import methods
from resu.experiments.recipes import Row, dense_start, plan_key, run
from resu.experiments.render import ORDER, SPARSE_TRAINING, render, summarize
from resu.experiments.tasks import Regime, Task, tasks

__all__ = ["main"]

_QUICK = 20  # how many times fewer steps --quick takes

Job = tuple[str, float, int]  # method, sparsity, seed

_data: dict[tuple[str, str], Dataset] = {}


def _dataset(task: Task, directory: str | None) -> Dataset:
    key = (task.data, directory or "")
    if key not in _data:
        _data[key] = task.dataset(directory)
    return _data[key]


@dataclass(frozen=True)
class _Setup:
    """What all runs of one call have in common; goes to the workers."""

    name: str
    regime: Regime
    quick: bool
    lr_factor: float
    directory: str | None
    cache: Path
    threads: int

    @property
    def task(self) -> Task:
        """The task; a factor on the learning rate leaves the dense networks of fine-tuning as they are."""
        task = tasks[self.name].shortened(_QUICK) if self.quick else tasks[self.name]
        if self.regime == "finetune":
            return replace(task, finetune_lr=task.finetune_lr * self.lr_factor)
        return replace(task, lr=task.lr * self.lr_factor)


def _work(setup: _Setup, job: Job | int) -> Row | str:
    """In a worker: one run, or (a bare seed) the trained dense network that the runs of a seed start from.

    A run that fails is a line of text, so that the others go on.
    """
    torch.set_num_threads(setup.threads)
    task = setup.task
    data = _dataset(task, setup.directory)
    if isinstance(job, int):
        dense_start(task, job, data, setup.cache)
        return f"dense network of seed {job} ready"
    try:
        return run(task, *job, setup.regime, data=data, cache=setup.cache)
    except Exception as error:
        return f"FAILED {' '.join(map(str, job))}: {type(error).__name__}: {error}"


@contextmanager
def _progress(total: int, what: str) -> Iterator[Callable[[str], None]]:
    """A function to call with each finished job; a bar where rich is there and errors go to a terminal."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        done = itertools.count(1)
        yield lambda text: print(f"[{next(done)}/{total}] {text}", file=sys.stderr, flush=True)
        return
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        handle = bar.add_task(what, total=total)

        def advance(text: str) -> None:
            bar.advance(handle)
            console.print(text)

        yield advance


def _results(pool: ProcessPoolExecutor | None, setup: _Setup, jobs: Sequence[Job | int]) -> Iterator[Row | str]:
    """Results as they come, from this process or from workers."""
    if pool is None:
        yield from (_work(setup, job) for job in jobs)
        return
    for future in as_completed([pool.submit(_work, setup, job) for job in jobs]):
        yield future.result()


def missing(task: Task, regime: Regime, jobs: Iterable[Job], done: Iterable[Row]) -> list[Job]:
    """The jobs whose rows are not there yet; the dense one once per seed, whatever the sparsities."""
    keys = {row.key for row in done}
    left: dict[tuple[str, ...], Job] = {}
    for method, sparsity, seed in jobs:
        sparsity = 0.0 if method == "dense" else sparsity
        key = plan_key(task, method, sparsity, seed, regime)
        if key not in keys:
            left[key] = (method, sparsity, seed)
    return list(left.values())


def _run_all(options: argparse.Namespace) -> int:
    cache = options.cache or options.out / "dense"
    setup = _Setup(
        *(options.task, options.regime, options.quick, options.lr_factor),
        *(options.data_dir, cache, options.threads),
    )
    suffix = "" if options.lr_factor == 1 else f"_lr{options.lr_factor:g}"
    csv = options.out / f"honest_{options.task}_{options.regime}{suffix}.csv"
    order = itertools.product(options.seeds, options.sparsities, options.methods)
    jobs = [(method, sparsity, seed) for seed, sparsity, method in order]
    todo = missing(setup.task, options.regime, jobs, read_rows(csv))
    starts = sorted({seed for _, _, seed in todo}) if options.regime == "finetune" else []
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(options.jobs, mp_context=context) if options.jobs > 1 else None
    failures = 0
    try:
        with _progress(len(starts) + len(todo), f"{options.task} {options.regime}") as advance:
            for text in _results(pool, setup, starts):
                advance(str(text))
            for row in _results(pool, setup, todo):
                if isinstance(row, str):
                    failures += 1
                    advance(row)
                    continue
                append_row(csv, row)
                advance(
                    f"{row.method:<18} {row.sparsity:<5g} seed {row.seed}  {row.metric} {row.test:.3f}"
                    f"  {row.seconds:.1f} s{'' if row.zeros_exact else '  NOT EXACT'}"
                )
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    print(csv)
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m resu.experiments.honest", description=__doc__)
    parser.add_argument("--task", default="mlp", choices=list(tasks))
    parser.add_argument("--regime", default="finetune", choices=["scratch", "finetune"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.8, 0.9, 0.95, 0.98])
    usual = [name for name in ORDER if name not in SPARSE_TRAINING]
    parser.add_argument("--methods", nargs="+", default=usual, metavar="METHOD", help=", ".join(methods))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--data-dir", help="folder of the data (default: RESU_DATA)")
    parser.add_argument("--cache", type=Path, help="folder of trained dense networks (default: OUT/dense)")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--threads", type=int, default=1, help="threads of each; 1 makes rows repeatable")
    parser.add_argument("--lr-factor", type=float, default=1.0, help="on the learning rate, in a CSV of its own")
    parser.add_argument("--quick", action="store_true", help=f"{_QUICK} times fewer steps, to try things")
    parser.add_argument("--render", type=Path, metavar="PAGE", help="write tables and a plot from OUT instead")
    parser.add_argument("--summary", type=Path, metavar="PAGE", help="write one small table into a page instead")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        for name in options.methods:
            methods[name]
        for sparsity in options.sparsities:
            check_sparsity(sparsity)
        if options.render is not None:
            render(options.out, options.render)
            return 0
        if options.summary is not None:
            summarize(options.out, options.summary)
            return 0
        return _run_all(options)
    except (DataError, ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
