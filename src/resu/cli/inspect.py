"""``resu inspect``: what is in a checkpoint, a model folder or a mask file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from resu.cli._common import Json, format_bytes, format_count, print_json, stdout

EXAMPLE = "Example: resu inspect resu_quickstart/model.safetensors"

_BARS = 40
_BINS = 10


def command(
    file: Annotated[
        Path, typer.Argument(help="A checkpoint or mask file, or a model folder, sharded or not, dense or bitmask.")
    ],
    as_json: Json = False,
) -> None:
    """Show what a checkpoint, model folder or mask file holds: sparsity, kept weights and bytes of each tensor.

    In a folder, masks.safetensors says what is kept. Checksums of what is read are verified; validate checks all.
    """
    from resu.formats.inspect import describe

    found = describe(file)
    if as_json:
        print_json(found)
    else:
        _tell(found)


def histogram(sparsities: Sequence[float]) -> list[str]:
    r"""How many tensors have which sparsity, as text; empty bins at both ends are left out.

    Example:
        >>> print("\n".join(histogram([0.5, 0.55, 0.55, 0.81])))
          50– 60 %  ████████████████████████████████████████ 3
          60– 70 %  0
          70– 80 %  0
          80– 90 %  █████████████ 1
    """
    counts = [0] * _BINS
    for sparsity in sparsities:
        counts[min(_BINS - 1, int(sparsity * _BINS + 1e-9))] += 1
    filled = [index for index, count in enumerate(counts) if count]
    lines = []
    for index in range(filled[0], filled[-1] + 1) if filled else ():
        low, high = 100 * index // _BINS, 100 * (index + 1) // _BINS
        bar = "█" * max(counts[index] > 0, round(_BARS * counts[index] / max(counts)))
        lines.append(f"  {low:>2}–{high:>3} %  {bar}{' ' if bar else ''}{counts[index]}")
    return lines


def weights_of(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One row per weight whose sparsity means something: those with a mask, or else all weights."""
    masked = {row["name"]: row for row in rows if row["masked"] and row["kind"] != "extra"}
    weights = list(masked.values()) or [row for row in rows if row["kind"] == "weight"]
    return [row for row in weights if row["sparsity"] is not None]  # None: an empty tensor


def _tell(found: Mapping[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    rows, total = found["tensors"], found["total"]
    origin = f", written by resu {found['library']}" if found["library"] else ""
    console = stdout()
    title = f"{found['path']}: {found['kind']}, {format_bytes(found['bytes'])} on disk{origin}"
    console.print(title, markup=False, soft_wrap=True)
    table = Table(show_footer=bool(rows))
    table.add_column("name", "pruned weights" if any(row["masked"] for row in rows) else "weights", overflow="fold")
    table.add_column("kind")
    table.add_column("shape", justify="right")
    table.add_column("dtype")
    table.add_column("kept", format_count(total["kept"]), justify="right")
    table.add_column("sparsity", f"{100 * total['sparsity']:.2f} %", justify="right")
    table.add_column("bytes", f"{format_bytes(total['bytes'])} in all", justify="right")
    weights = weights_of(rows)
    for row in rows:
        shown = row["kept"] is not None and (row["masked"] or row["kind"] == "weight")
        table.add_row(
            escape(row["name"]),
            row["kind"],
            "×".join(map(str, row["shape"])),
            row["dtype"],
            format_count(row["kept"]) if shown else "",
            f"{100 * row['sparsity']:.2f} %" if shown and row["sparsity"] is not None else "",
            format_bytes(row["bytes"]),
        )
    console.print(table)
    if weights and not any(row["masked"] for row in weights):
        console.print("No masks in the file: kept are the values that are not zero.")
    if weights:
        console.print(f"\nSparsity of {len(weights)} weights")
        for line in histogram([row["sparsity"] for row in weights]):
            console.print(line, markup=False)
    for key, value in found["metadata"].items():
        console.print(f"{key}: {value}", markup=False)
