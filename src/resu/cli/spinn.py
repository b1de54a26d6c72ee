"""``resu spinn``: the sparse physics-informed twin of a machine tool, from a recording to a report."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resu.cli._common import CliError, Force, Json, parse_sparsity, print_json, refuse_taken, require, stdout

if TYPE_CHECKING:
    from resu.experiments.spinn.application import Settings

EXAMPLE = "Example: resu spinn wear --data ./data --out twin"
QUANTITIES = ("wear", "milling", "thermal")


def command(
    quantity: Annotated[
        str,
        typer.Argument(metavar="QUANTITY", help=f"What the twin predicts: {', '.join(QUANTITIES)}."),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    data: Annotated[
        Path | None, typer.Option(help="The folder of data sets; left out: the one RESU_DATA names.")
    ] = None,
    sparsity: Annotated[str, typer.Option(help="Of the network's weights after the last stage.")] = "0.7",
    stages: Annotated[
        str, typer.Option(help="How many; or what each removes of what is still active: 0.3,0.3,0.2,0.2345.")
    ] = "4",
    physics: Annotated[bool, typer.Option(help="Whether the law of physics is part of the loss.")] = True,
    max_drop: Annotated[
        float | None, typer.Option(help="R² on the validation part a stage may cost; more, and it is taken back.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small network and few steps: does everything run?")] = False,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped, or begin one.")] = False,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Train a twin of a machine tool, make it sparse in stages, and report.

    A dense network learns flank wear or displacement by heat from a real recording, with a law of physics in its loss
    whose constants it learns too. It is pruned in stages under its masks, and whole neurons are taken out of a copy.
    The folder then holds the networks, a checkpoint per stage, two figures and a one-page report.
    """
    require("matplotlib", "plots")
    from resu.cli._common import shown_progress
    from resu.experiments.spinn.application import Settings, build

    if quantity not in QUANTITIES:
        raise CliError(f"QUANTITY must be one of {', '.join(QUANTITIES)}, got {quantity!r}")
    settings = Settings(quantity, parse_sparsity(sparsity), _stages(stages), physics, max_drop, quick, seed)
    _check_plan(settings)
    folder = data or (Path(os.environ["RESU_DATA"]) if os.environ.get("RESU_DATA") else None)
    if folder is None:
        raise CliError("where is the data? Pass --data, or set RESU_DATA")
    if force and not resume and (out / "settings.json").is_file():
        _clear(out)
    elif not resume:
        refuse_taken(out, force, hint="; pass --resume to go on with a run")
    with shown_progress("spinn") as tick:
        report = build(settings, folder, out, progress=tick)
    if as_json:
        print_json({**report, "out": str(out)})
    else:
        _tell(report, out)


def _stages(given: str) -> int | tuple[float, ...]:
    texts = given.replace(",", " ").split()
    try:
        if len(texts) == 1 and texts[0].isdigit():
            return int(texts[0])
        if texts:
            return tuple(float(text) for text in texts)
    except ValueError:
        pass
    raise CliError(f"--stages is a number of stages, or fractions such as 0.3,0.3,0.2; got {given!r}")


def _check_plan(settings: Settings) -> None:
    """A plan that misses is refused before anything is read or written."""
    from resu.pruning.stage_plan import plan_stages

    plan_stages(settings.sparsity, settings.stages)


def _clear(out: Path) -> None:
    """Take away what an earlier run of this command wrote, and nothing else."""
    for name in ("dense", "sparse", "structured"):
        (out / f"{name}.safetensors").unlink(missing_ok=True)
    for name in ("settings.json", "dense.json", "report.json", "report.md", "measured.png", "removed.png"):
        (out / name).unlink(missing_ok=True)
    if (out / "stages" / "run.json").is_file():
        shutil.rmtree(out / "stages")


def _tell(report: dict[str, Any], out: Path) -> None:
    from rich.table import Table

    console = stdout()
    table = Table(title=f"{report['settings']['quantity']}: held-out rows", title_justify="left")
    for column in ("", "parameters", "removed", "R²", f"RMS error, {report['unit']}", "µs"):
        table.add_column(column, justify="left" if not column else "right")
    for name, network in report["networks"].items():
        time = report["latency_us"].get(name)
        table.add_row(
            *(name, f"{network['parameters']:,}"),
            f"{100 * network['removed']:.1f} %" if "removed" in network else "",
            f"{network['r2']:.3f}",
            ", ".join(f"{error:.3g}" for error in network["rmse"]),
            "" if time is None else f"{time:.0f}",
        )
    console.print(table)
    stages = ", ".join(
        f"{100 * stage['actual']:.1f} %{'' if stage['accepted'] else ' (taken back)'}" for stage in report["stages"]
    )
    console.print(f"stages: {stages}", markup=False, soft_wrap=True)
    for name, value in report["networks"]["sparse"]["constants"].items():
        console.print(f"learned {name}: {value}", markup=False, soft_wrap=True)
    console.print(f"{out}: report.md, measured.png, removed.png, three networks", markup=False, soft_wrap=True)
