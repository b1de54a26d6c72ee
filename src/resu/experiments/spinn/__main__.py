"""``python -m resu.experiments.spinn``: run what is missing, write the tables and the figures.

    python -m resu.experiments.spinn --seeds 5 --results benchmarks/results/spinn --out docs

The same command again goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from resu.experiments.render import BEGIN, END, around_marks, write_page
from resu.experiments.spinn.fields import FIELDS
from resu.experiments.spinn.jobs import jobs, one
from resu.experiments.spinn.recordings import RECORDINGS, load_recording
from resu.experiments.spinn.results import Results
from resu.experiments.spinn.runs import RECIPES, quantity_rows
from resu.experiments.spinn.table import tables
from resu.experiments.workers import spread


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m resu.experiments.spinn", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("RESU_DATA") or "../shared/data"))
    parser.add_argument("--results", type=Path, required=True, help="folder of rows; what is in it is not run again")
    parser.add_argument("--quantities", nargs="*", choices=list(RECORDINGS), default=list(RECORDINGS))
    parser.add_argument("--fields", nargs="*", choices=list(FIELDS), default=list(FIELDS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--out", type=Path, help="folder for the tables in spinn.md and for figures, written over")
    given = parser.parse_args(arguments)
    if given.seeds < 1 or given.jobs < 1:
        parser.error("--seeds and --jobs are at least 1")
    for k in range(2):
        todo = jobs(given.quantities, given.fields, given.seeds, Results.read(given.results))[k]
        print(f"{len(todo)} runs", flush=True)
        shared = (given.data, given.results)
        spread(one, shared, [(job,) for job in todo], given.jobs, lambda job: print(*job, flush=True))
    if given.out is not None:
        _write(given.out, given.data, Results.read(given.results), given.quantities)


def _write(out: Path, data: Path, found: Results, quantities: Sequence[str]) -> None:
    from resu.experiments.plots import to_png
    from resu.experiments.spinn.figures import draw_measured, draw_removed

    out.mkdir(parents=True, exist_ok=True)
    targets, units = {}, {}
    for name in quantities:
        prepared = load_recording(name, data).prepare()
        targets[name], units[name] = prepared.targets.flatten().tolist(), prepared.recording.unit
        _, twins = quantity_rows(prepared, RECIPES[name], 0, physics=True)
        shown = {way: twin.predict(prepared.inputs) for way, twin in twins.items() if way != "RESU"}
        (out / f"spinn_{name}.png").write_bytes(to_png(draw_measured(prepared, shown)))
        if name == "wear":
            smaller = {way: twin.network for way, twin in twins.items() if way != "dense"}
            (out / "spinn_removed.png").write_bytes(to_png(draw_removed(smaller, twins["dense"].network)))
    page = out / "spinn.md"
    before, after = around_marks(page, "The twin of a machine tool")
    write_page(page, f"{before}{BEGIN}\n\n{tables(found, targets, units)}\n\n{END}{after}")
    print(f"wrote {page} and figures")


if __name__ == "__main__":
    main()
