"""``resu convert``: a model in another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resu.cli._common import CliError, Force, Json, format_bytes, print_json, shown_progress, stdout

EXAMPLE = "Example: resu convert pruned_model/ --to bitmask --out small_model/"


def command(
    source: Annotated[Path, typer.Argument(help="A model folder or a safetensors file, dense or bitmask.")],
    to: Annotated[
        str, typer.Option("--to", help="dense, bitmask, or sparse-24 (masks that are 2:4).", metavar="LAYOUT")
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder, or for a file the file, to write.")],
    masks: Annotated[
        Path | None, typer.Option("--masks", help="Mask file; default: masks.safetensors beside the weights.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a model in another layout: dense with zeros, or kept values and one bit per weight.

    bitmask and sparse-24 are the layouts of compressed-tensors up to 0.14 (sparse-bitmask, sparse-24-bitmask), so this
    also makes models that it compressed readable again. Ties, dtypes, configuration and tokenizer are kept.
    """
    from resu.integrations.convert import convert

    try:
        with shown_progress("converting") as tick:
            report = convert(source, out, to, masks=masks, overwrite=force, progress=tick)
    except FileExistsError as error:
        raise CliError(str(error).replace("overwrite=True", "--force")) from None
    if as_json:
        print_json(report)
        return
    total = report["total"]
    console = stdout()
    console.print(f"{report['source']} → {report['out']}: {report['layout']}", markup=False, soft_wrap=True)
    dense = f", {report['dense']} with a mask dense" if report["dense"] else ""
    console.print(f"  weights   {report['packed']} packed{dense}; sparsity {100 * total['sparsity']:.2f} %")
    before, after = report["bytes_before"], report["bytes_after"]
    console.print(f"  bytes     {format_bytes(before)} → {format_bytes(after)}")
