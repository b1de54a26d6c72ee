"""``resu validate``: whether a checkpoint, a mask file or a pruned model is what it should be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from resu.cli._common import Json, format_count, parse_sparsity, print_json, shown_progress, stdout

EXAMPLE = "Example: resu validate pruned_model/ --pattern 2:4"


def command(
    path: Annotated[Path, typer.Argument(help="A checkpoint, a mask file, or a model folder, dense or bitmask.")],
    masks: Annotated[
        Path | None, typer.Option("--masks", help="Mask file; default: masks.safetensors beside the weights.")
    ] = None,
    sparsity: Annotated[
        str | None, typer.Option("--sparsity", help="What all masks together must have, exactly.", metavar="S")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option("--pattern", help="What each mask must have: 2:4, row, block:16x1, ….")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check files: checksums, shapes, exact zeros at pruned positions, counts, patterns, ties, finite values.

    Exit code 0: nothing is wrong. 1: something is, and each finding is named. 2: the call cannot be understood.
    """
    from resu.formats.validate import validate

    wanted = parse_sparsity(sparsity) if sparsity is not None else None
    with shown_progress("checking") as tick:
        found = validate(path, masks=masks, sparsity=wanted, pattern=pattern, progress=tick)
    if as_json:
        print_json(found)
    else:
        _tell(found)
    if not found["ok"]:
        raise typer.Exit(1)


def _tell(found: Mapping[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    console, total = stdout(), found["total"]
    if found["tensors"]:
        table = Table(show_footer=bool(total["masks"]))
        table.add_column("name", "all masks", overflow="fold")
        table.add_column("shape", justify="right")
        table.add_column("dtype")
        table.add_column("layout")
        table.add_column("kept", format_count(total["kept"]), justify="right")
        table.add_column("sparsity", f"{100 * total['sparsity']:.2f} %", justify="right")
        table.add_column("checksum")
        table.add_column("")
        for row in found["tensors"]:
            masked = row["kept"] is not None
            table.add_row(
                escape(row["name"]),
                "×".join(map(str, row["shape"])),
                row["dtype"],
                row["layout"],
                format_count(row["kept"]) if masked else "",
                f"{100 * row['sparsity']:.2f} %" if masked else "",
                "" if not row["checksum"] else "ok" if row["ok"] else "",
                "ok" if row["ok"] else "[red]wrong[/red]",
            )
        console.print(table)
    for note in found["notes"]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    for violation in found["violations"]:
        console.print(f"wrong: {violation['name']}: {violation['problem']}", markup=False, soft_wrap=True)
    n, checksums = len(found["tensors"]), total["checksums"]
    verdict = "ok" if found["ok"] else f"{len(found['violations'])} wrong"
    line = f"{found['path']}: {verdict}; {n} tensors, {total['masks']} masks, checksums of {checksums}"
    console.print(line, markup=False, soft_wrap=True)
