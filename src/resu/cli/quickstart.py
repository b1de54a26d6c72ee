"""``resu quickstart``: every way to make one network sparse, at the same cost, on real data."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resu.cli._common import (
    CliError,
    Force,
    Json,
    output_folder,
    parse_sparsity,
    print_json,
    progress,
    refuse_taken,
    require,
    stdout,
    write_whole,
)

if TYPE_CHECKING:
    from resu.experiments.quickstart import Comparison

EXAMPLE = "Example: resu quickstart --sparsity 0.9 --seeds 5 --out my_run"
SWEEP_SEEDS = 1
DATA_NAMES = ("digits", "fashion-mnist")


def command(
    data: Annotated[str, typer.Option(help="digits (ships with scikit-learn) or fashion-mnist.")] = "digits",
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the Fashion-MNIST files; else RESU_DATA names its parent.")
    ] = None,
    sparsity: Annotated[str, typer.Option(help="Fraction of the weights removed, in [0, 1).")] = "0.8",
    seeds: Annotated[int, typer.Option(help="Runs per method.", min=1)] = 3,
    steps: Annotated[
        int | None, typer.Option(help="Training steps of every run; the default depends on the data.", min=20)
    ] = None,
    sweep: Annotated[bool, typer.Option(help="Also train at 50, 80, 90 and 95 %, for the plot.")] = True,
    jobs: Annotated[int | None, typer.Option(help="Processes; by default one per core, 4 at most.", min=1)] = None,
    out: Annotated[Path, typer.Option(help="Folder for model, masks and report.")] = Path("resu_quickstart"),
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make a small network sparse in every way the library has, and see what each one costs and keeps.

    Every run has the same number of training steps, dense training and fine-tuning together.
    """
    start = time.perf_counter()
    if data not in DATA_NAMES:
        raise CliError(f"unknown --data {data!r}; known: {', '.join(DATA_NAMES)}")
    level = parse_sparsity(sparsity)
    if level == 0.0:
        raise CliError("--sparsity 0 removes nothing; choose a fraction such as 0.8")
    if data_dir is not None and data == "digits":
        raise CliError("--data-dir goes with --data fashion-mnist; the digits ship with scikit-learn")
    page = out / "report.html"
    refuse_taken(out, force, f" of an earlier run (see {page})" if page.is_file() else "")
    require("matplotlib", "demo")
    if data == "digits":
        require("sklearn", "demo")

    from resu.experiments import quickstart
    from resu.experiments.workers import WorkerDied, default_workers

    loaded = quickstart.load_data(data, data_dir)
    output_folder(out, force)
    steps = steps or quickstart.DATA[data][1]
    sweep_seeds = SWEEP_SEEDS if sweep else 0
    with progress() as bar:
        total = quickstart.count_runs(level, seeds, sweep_seeds)
        task = bar.add_task("training", total=total)
        try:
            comparison = quickstart.compare(
                data,
                loaded,
                level,
                range(seeds),
                steps,
                sweep_seeds=sweep_seeds,
                workers=min(jobs or default_workers(), total),
                on_run=lambda label: bar.update(task, description=label, advance=1),
            )
        except WorkerDied as error:
            raise CliError(f"{error} (--jobs)") from None
        bar.update(task, description="saving")
        document = _save(out, comparison, data, start)
    if as_json:
        print_json(document)
    else:
        _tell(document, out)


def _save(out: Path, comparison: Comparison, data: str, start: float) -> dict[str, Any]:
    """Write model, masks, plots and page; returns the document of ``--json``."""
    from resu.cli import report
    from resu.experiments.modes import memory_by_mode
    from resu.experiments.quickstart import LABELS
    from resu.formats.files import save_checkpoint
    from resu.pruning.mask_ops import save_mask

    best = comparison.best
    about = {"method": best.method, "data": data, "seed": best.seed, "steps": comparison.task.steps}
    model = out / "model.safetensors"
    save_checkpoint(best.model, model, masks=best.masks, metadata=about, layout="bitmask", overwrite=True)
    save_mask(best.masks, out / "masks.safetensors", metadata=about, overwrite=True)
    table = report.rows(comparison, _disk_bytes(comparison))
    lead = report.verdict_lines(comparison)
    memory = memory_by_mode(comparison.runs["dense"][0].model, comparison.sparsity, comparison.data)
    images = _plots(out, comparison, memory)
    document: dict[str, Any] = {
        "data": data,
        "sparsity": comparison.sparsity,
        "steps": comparison.task.steps,
        "seeds": list(comparison.seeds),
        "methods": table,
        "sweep": comparison.sweep,
        "memory_by_mode": memory,
        "verdict": lead,
        "saved": {**about, "label": LABELS[best.method], "test_accuracy": best.accuracy},
        "environment": report.environment(),
    }
    title = f"resu quickstart: {data} at {100 * comparison.sparsity:g} % sparsity"
    small = _notes(document)
    report.write_page(out / "report.html", title, lead, table, best.method, images, small)
    document["seconds"] = round(time.perf_counter() - start, 1)
    write_whole(out / "results.json", json.dumps(document, indent=2, default=str).encode())
    return document


def _disk_bytes(comparison: Comparison) -> Mapping[str, int]:
    """Size of each method's checkpoint: the dense one plain, the others with kept values and one bit per weight."""
    from resu.formats.files import save_checkpoint

    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, runs in comparison.runs.items():
            path = Path(folder) / "model.safetensors"
            save_checkpoint(runs[0].model, path, masks=runs[0].masks, layout="bitmask")
            sizes[name] = path.stat().st_size
            path.unlink()
    return sizes


def _plots(out: Path, comparison: Comparison, memory: Mapping[str, Mapping[str, int]]) -> dict[str, bytes]:
    """Draw and write the four plots; returns their PNG bytes by title."""
    from resu.experiments import plots
    from resu.experiments.quickstart import LABELS

    images = {}

    def keep(file: str, title: str, figure: Any) -> None:
        images[title] = plots.to_png(figure)
        write_whole(out / file, images[title])

    runs = comparison.runs
    figure = plots.new_figure()
    curves = {LABELS[name]: curve for name, curve in comparison.sweep.items()} or {
        LABELS[name]: {comparison.sparsity: [run.accuracy for run in some]}
        for name, some in runs.items()
        if name != "dense"
    }
    plots.draw_accuracy(figure.subplots(), curves, [run.accuracy for run in runs["dense"]])
    plots.legend_below(figure)
    keep("accuracy.png", "Accuracy against sparsity", figure)

    figure = plots.new_figure()
    shown = [name for name in ("one-shot", "resu", "qresu") if name in runs]
    layers = {LABELS[n]: {k: m.sparsity for k, m in runs[n][0].masks.items()} for n in shown}
    plots.draw_layers(figure.subplots(), layers)
    plots.legend_below(figure)
    keep("layers.png", "Sparsity of each layer", figure)

    figure = plots.new_figure()
    title = f"Bytes held after a training step at {100 * comparison.sparsity:g} %"
    plots.draw_memory(figure.subplots(), memory, title)
    plots.legend_below(figure, 4)
    keep("memory.png", "Memory by kind", figure)

    figure = plots.new_figure(height=5.6)
    above, below = figure.subplots(2, 1)
    plots.draw_training(above, runs["inline"][0].trace, f"Training: {LABELS['inline']}")
    plots.draw_training(below, runs["resu"][0].trace, f"Training: {LABELS['resu']}")
    plots.legend_below(figure)
    keep("training.png", "Training", figure)
    return images


def _notes(document: Mapping[str, Any]) -> list[str]:
    where = document["environment"]
    return [
        f"Every run: {document['steps']} steps in all, the same batches and learning rates; seeds "
        f"{', '.join(map(str, document['seeds']))}. ± is the standard deviation over seeds; differences are "
        "given with two standard errors from test examples and seeds. The saved model was chosen by held-out "
        "data, not by the test set.",
        "Held while training: the most bytes of weights, gradients, optimizer state, masks and θ at any "
        "sampled step. Cycles keep the optimizer state of their dense phases while θ trains, so their peak is "
        "that of dense training or above; the memory plot shows what each mode itself holds.",
        f"resu {where['resu']}, torch {where['torch']}, Python {where['python']}, {where['machine']}.",
    ]


def _tell(document: Mapping[str, Any], out: Path) -> None:
    """Table, verdict and what to do next."""
    from rich.table import Table

    from resu.cli import report

    console = stdout()
    title = (
        f"{document['data']} at {100 * document['sparsity']:g} % sparsity: "
        f"{document['steps']} steps per run, {len(document['seeds'])} seed(s)"
    )
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(report.COLUMNS):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in document["methods"]:
        style = "bold" if row["method"] == document["saved"]["method"] else None
        table.add_row(*report.cells(row), style=style, end_section=row["method"] == "dense")
    console.print(table)
    for line in document["verdict"]:
        console.print(line, markup=False)
    saved = document["saved"]
    console.print(
        f"\nSaved {saved['label']} (best on held-out data; test {saved['test_accuracy']:.1f} %) in {out}/ "
        f"after {document['seconds']:.0f} s:\n"
        f"  report.html         this table with plots (open it in a browser)\n"
        f"  model.safetensors   the sparse model, for resu.load_checkpoint\n"
        f"  masks.safetensors   its masks\n"
        f"  results.json        every number above\n"
        f"\nNext:\n"
        f"  resu inspect {out / 'model.safetensors'}\n"
        f"  resu quickstart --sparsity 0.95 --out sparser\n"
        f"  resu plan --layers 4096x4096*4,4096x11008*3 --sparsity 0.5\n"
        f"  in your own loop: from resu.training import RESU, Sparsifier",
        markup=False,
    )
