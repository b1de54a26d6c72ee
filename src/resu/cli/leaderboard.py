"""``resu leaderboard``: tables and plots of many training runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resu.cli._common import CliError, Force, Json, print_json, stdout, write_whole

if TYPE_CHECKING:
    from resu.experiments.board import Board
    from resu.experiments.train import Result

EXAMPLE = "Example: resu leaderboard runs/ --out leaderboard"
FILES = ("leaderboard.md", "leaderboard.csv", "rows.csv", "accuracy_sparsity.png", "accuracy_flops.png")


def command(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUNS", help="Folders of runs, at any depth, and .csv files of their rows.")
    ],
    out: Annotated[Path | None, typer.Option(help="A folder for tables, rows and plots.")] = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Compare training runs: mean and spread over seeds, FLOPs of training and inference.

    Runs of other data, models, steps or recipes make tables of their own. With --out there are leaderboard.md,
    leaderboard.csv, two plots, and rows.csv: one line per run, which this command reads again.
    """
    from dataclasses import asdict

    from resu.experiments.board import boards, collect, lines, unfinished

    results = collect(runs)
    found = boards(results)
    left = unfinished(runs)
    if out is not None:
        _write(out, found, results, force)
    if as_json:
        tables = [
            {"title": board.title, "recipe": board.recipe, "lines": [asdict(line) for line in lines(board)]}
            for board in found
        ]
        where = None if out is None else str(out)
        print_json({"runs": len(results), "unfinished": left, "tables": tables, "out": where})
        return
    _tell(found, left, out)


def _write(out: Path, found: list[Board], results: list[Result], force: bool) -> None:
    from resu.experiments.board import lines
    from resu.experiments.board_page import markdown, plot_flops, plot_sparsity
    from resu.experiments.rows import as_csv

    if out.exists() and not out.is_dir():
        raise CliError(f"--out {out} is a file; name a folder")
    taken = [name for name in FILES if (out / name).exists()]
    if taken and not force:
        raise CliError(f"{out / taken[0]} exists; pass --force to replace it, or --out for another folder")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "rows.csv", as_csv(results).encode())
    write_whole(out / "leaderboard.csv", as_csv([line for board in found for line in lines(board)]).encode())
    images = {"accuracy_sparsity.png": plot_sparsity, "accuracy_flops.png": plot_flops}
    shown = [board for board in found if board.sparsities]
    for name, draw in images.items():
        if shown:
            write_whole(out / name, draw(shown))
    write_whole(out / "leaderboard.md", markdown(found, list(images) if shown else ()).encode())


def _tell(found: list[Board], left: int, out: Path | None) -> None:
    from rich.table import Table

    from resu.experiments.board import lines
    from resu.experiments.board_page import HEAD, cells

    console = stdout(140)
    for board in found:
        table = Table(title=f"{board.title}: {board.metric}\n{board.recipe}", title_justify="left")
        for i, name in enumerate(HEAD):
            table.add_column(name, justify="left" if i == 1 else "right")
        listed = lines(board)
        for line, after in zip(listed, [*listed[1:], None], strict=True):
            ends = after is None or after.sparsity != line.sparsity
            table.add_row(*cells(line), style="bold" if line.best else None, end_section=ends)
        console.print(table)
    notes: list[Any] = ["FLOPs are against dense training and inference; tried: the share of positions ever active."]
    if left:
        notes.append(f"{left} run(s) without a result left out; resu train CONFIG --out RUN --resume goes on with one.")
    if out is not None:
        notes.append(f"In {out}/: {', '.join(name for name in FILES if (out / name).exists())}")
    console.print("\n".join(notes), markup=False, soft_wrap=True)
