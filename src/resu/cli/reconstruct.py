"""``resu reconstruct``: a pruned model directory and the dense one in, a repaired one out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from resu.cli._common import CALIBRATION_TEXT, Device, Force, Json, Length, print_json, progress, require, stdout
from resu.cli.prune import as_options, parse_device, shown_by

EXAMPLE = "Example: resu reconstruct ./llama-50 --dense ./llama --calibration c4.jsonl --out ./llama-50-repaired"


def command(
    pruned: Annotated[
        Path, typer.Argument(metavar="PRUNED_DIR", help="A pruned Hugging Face directory, as resu prune writes it.")
    ],
    dense: Annotated[Path, typer.Option(help="The directory that it was pruned from.")],
    calibration: Annotated[Path, CALIBRATION_TEXT],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    train: Annotated[
        str,
        typer.Option(
            help="kept: the kept weights. lora: a low-rank change under the mask, merged. theta: values at pruned "
            "positions; the result is dense."
        ),
    ] = "kept",
    targets: Annotated[
        str, typer.Option(help="What a block is to give: the dense block on dense inputs, or on the repaired (sparse).")
    ] = "dense",
    epochs: Annotated[int, typer.Option(min=1, help="How often each calibration batch comes.")] = 10,
    lr: Annotated[float, typer.Option(help="First step, relative to the size of a layer's kept weights.")] = 3e-2,
    rank: Annotated[int, typer.Option(min=1, help="Of the low-rank change.")] = 16,
    samples: Annotated[int, typer.Option(min=2, help="Calibration samples.")] = 128,
    length: Length = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per step; fewer where they are long.")] = 8,
    held_out: Annotated[float, typer.Option(help="Fraction of the batches that choose the epoch.")] = 0.125,
    masks: Annotated[Path | None, typer.Option(help="Mask file; left out: masks.safetensors in PRUNED_DIR.")] = None,
    blocks: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Modules trained one at a time; left out: found.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run, or begin one.")] = False,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of calibration samples, order and start values.")] = 0,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Repair a pruned model block by block, towards the activations of the dense one.

    Blocks are read from both directories one at a time, so a model larger than memory is repaired on a small machine.
    Masks stay as they are. A block that training does not make better on held-out text stays as it was.
    """
    require("transformers", "hf")
    from resu.integrations.reconstruct import reconstruct_directory

    with progress() as bar, as_options():
        report = reconstruct_directory(
            pruned,
            out,
            dense=dense,
            calibration=calibration,
            masks=masks,
            samples=samples,
            length=length,
            batch_size=batch_size,
            blocks=blocks or None,
            device=parse_device(device),
            resume=resume,
            overwrite=force,
            progress=shown_by(bar),
            train=train,
            targets=targets,
            epochs=epochs,
            lr=lr,
            rank=rank,
            held_out=held_out,
            seed=seed,
        )
    if as_json:
        print_json({**report, "out": str(out)})
    else:
        _tell(report["reconstruction"], out)


def _tell(found: dict[str, Any], out: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for column in ("block", "layers", "error before", "after", "epoch"):
        table.add_column(column, justify="left" if column == "block" else "right")
    for block in found["blocks"]:
        epoch = str(block["epoch"]) if block["epoch"] else "left as it was"
        table.add_row(
            escape(block["name"]),
            str(len(block["layers"])),
            f"{block['before']:.4g}",
            f"{block['after']:.4g}",
            epoch,
        )
    console = stdout()
    console.print(table)
    for name, reason in found["skipped"].items():
        console.print(f"not repaired: {name}: {reason}", markup=False, soft_wrap=True)
    console.print(
        f"{out}: sparsity {100 * found['actual']:.2f} %, {found['seconds']:.1f} s", markup=False, soft_wrap=True
    )
