"""``python -m resu.experiments.finetuning``: run what is missing, write the table and the plot.

    python -m resu.experiments.finetuning --tune --csv tuning.csv           # learning rates, on held-out data
    python -m resu.experiments.finetuning --csv rows.csv --rates tuning.csv --out docs --guide docs/finetune.md
    python -m resu.experiments.finetuning --csv rows.csv --memory --out docs  # where the runs were on several machines

The same command again goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from resu.experiments.finetuning.front import draw_front, guide, page, points
from resu.experiments.finetuning.run import Row
from resu.experiments.finetuning.runs import jobs, one
from resu.experiments.finetuning.tasks import TASKS, load_task
from resu.experiments.finetuning.ways import KINDS, Way
from resu.experiments.plots import to_png
from resu.experiments.render import fill
from resu.experiments.rows import read
from resu.experiments.workers import spread


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m resu.experiments.finetuning", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("RESU_DATA") or "../shared/data"))
    parser.add_argument("--csv", type=Path, required=True, help="rows; what is in it is not run again")
    parser.add_argument("--rates", type=Path, help="rows of --tune, which learning rates are taken from")
    parser.add_argument("--tune", action="store_true", help="try learning rates on held-out data, seed 0")
    parser.add_argument("--memory", action="store_true", help="measure memory alone, all ways on this machine")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--sizes", nargs="+", type=float, help="instead of those of each kind")
    parser.add_argument("--seeds", nargs="+", type=int, default=[3, 4, 5])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--device", default="cpu", help="where to train, cpu or cuda; memory is measured there")
    parser.add_argument("--out", type=Path, help="folder for finetuning_front.md and .png, written over")
    parser.add_argument("--guide", type=Path, help="Markdown page to write the small table into")
    given = parser.parse_args(arguments)
    if not given.tune and not given.memory and given.rates is None:
        parser.error("--rates is needed: the CSV that --tune wrote")
    rates = read(given.rates, Row) if given.rates is not None else []
    todo = jobs(given, read(given.csv, Row), rates)
    print(f"{len(todo)} runs", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        shared = (given.data, Path(folder), given.csv, given.device)
        for name in given.tasks:  # files that runs share are made once
            if todo:
                load_task(name, given.data, Path(folder))

        def tell(job: tuple[object, ...]) -> None:
            name, way, seed, _, lr, *_ = job
            assert isinstance(way, Way)
            print(f"{name}: {way.label}, seed {seed}, rate {lr:g}", flush=True)

        spread(one, shared, todo, given.jobs, tell)
    if given.out is not None and not given.tune:
        rows = read(given.csv, Row)
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "finetuning_front.md").write_text(page(rows), encoding="utf-8")
        (given.out / "finetuning_front.png").write_bytes(to_png(draw_front(points(rows))))
        print(f"wrote {given.out / 'finetuning_front.md'} and .png")
    if given.guide is not None:
        fill(given.guide, {"ways": guide(read(given.csv, Row))}.get)


if __name__ == "__main__":
    main()
