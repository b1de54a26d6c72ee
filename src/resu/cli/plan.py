"""``resu plan``: will it fit? Bytes held while training, by mode, for layers that need not exist yet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resu.cli._common import (
    CliError,
    Json,
    format_bytes,
    format_count,
    parse_bytes,
    parse_sparsity,
    print_json,
    stdout,
)
from resu.cli._shapes import Shapes, parse_layers, read_config

if TYPE_CHECKING:
    import torch

EXAMPLE = "Example: resu plan --layers 4096x4096*4,4096x11008*3 --sparsity 0.5 --memory 16GB"

# label, mode, bits
MODES = (
    ("dense", "dense", 4),
    ("SPARSE", "sparse", 4),
    ("RESU", "resu", 4),
    ("QRESU, 8 bits", "qresu", 8),
    ("QRESU, 4 bits", "qresu", 4),
    ("QRESU-Selective, 4 bits", "qresu_selective", 4),
)
KINDS = {
    "active": "weights",
    "codes": "codes",
    "scales": "scales",
    "mask": "mask",
    "theta": "θ",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "other": "embeddings",
}
DTYPES = ("float32", "bfloat16", "float16")
OPTIMIZERS = ("adamw", "adam", "adam8bit", "momentum", "sgd", "none")  # with --batch, adafactor too


def command(
    layers: Annotated[str | None, typer.Option(help="Layers as INxOUT or INxOUT*REPEAT, separated by commas.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A Hugging Face config.json, or the folder that holds it.")
    ] = None,
    sparsity: Annotated[str, typer.Option(metavar="FLOAT", help="Fraction of the weights removed, in [0, 1).")] = "0.5",
    optimizer: Annotated[str, typer.Option(help=f"One of {', '.join(OPTIMIZERS)}.")] = "adamw",
    dtype: Annotated[str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}.")] = "float32",
    theta_dtype: Annotated[
        str | None, typer.Option(help="Of θ in the quantized modes; with --batch --dtype, else bfloat16.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory there is, such as 16GB: says what fits.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Samples per step: the whole of a fine-tuning step of --config is planned.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens per sample, with --batch.")] = 512,
    method: Annotated[
        list[str] | None, typer.Option(help="With --batch: a method, repeatable; left out: all of them.")
    ] = None,
    rank: Annotated[int, typer.Option(help="Of low-rank updates, with --batch.")] = 16,
    dropout: Annotated[float, typer.Option(help="In low-rank updates, with --batch.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="Of adamw, with --batch.")] = 0.0,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="With --batch: compute activations twice.")
    ] = False,
    in_backward: Annotated[
        bool,
        typer.Option(
            "--in-backward", "--update-in-backward", help="With --batch: update each weight as its gradient arrives."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Say how many bytes training holds in each mode: weights, θ, gradients and optimizer state.

    Computed by the formulas that resu.memory_report is tested against. Activations, biases, norms and what
    exists only within a step are not counted. Embeddings (of --config) are held, and not trained.

    With --config and --batch, whole fine-tuning steps of the model are planned instead, by method: activations and
    temporaries too. The step is followed without weights and without running it (needs transformers).
    """
    optimizer = "adam8bit" if optimizer == "adamw8bit" else optimizer  # as resu finetune calls it
    theta_dtype = theta_dtype or ("bfloat16" if batch is None else dtype)
    if batch is not None:
        from resu.cli._plan_step import plan_steps

        if config is None:
            raise CliError("--batch plans the steps of a whole model: give its --config, not --layers")
        setup = {
            "batch": batch,
            "length": length,
            "sparsity": parse_sparsity(sparsity),
            "dtype": dtype,
            "theta_dtype": theta_dtype,
            "optimizer": optimizer,
            "weight_decay": weight_decay,
            "rank": rank,
            "dropout": dropout,
            "checkpointing": gradient_checkpointing,
            "in_backward": in_backward,
        }
        plan_steps(config, method, setup, None if memory is None else parse_bytes(memory), as_json=as_json)
        return
    for name, given in (
        ("--method", method),
        ("--gradient-checkpointing", gradient_checkpointing),
        ("--in-backward", in_backward),
    ):
        if given:
            raise CliError(f"{name} belongs to a plan of whole steps: give --config and --batch too")
    level = parse_sparsity(sparsity)
    budget = None if memory is None else parse_bytes(memory)
    for option, value, known in (
        ("--optimizer", optimizer, OPTIMIZERS),
        ("--dtype", dtype, DTYPES),
        ("--theta-dtype", theta_dtype, DTYPES),
    ):
        if value not in known:
            raise CliError(f"unknown {option} {value!r}; known: {', '.join(known)}")
    if (layers is None) == (config is None):
        raise CliError("describe the model with --layers or with --config, one of the two")
    shapes = parse_layers(layers) if layers is not None else read_config(Path(str(config)))
    rows = [row(shapes, label, mode, bits, level, optimizer, dtype, theta_dtype, budget) for label, mode, bits in MODES]
    if as_json:
        document: dict[str, Any] = {
            "weights": shapes.numel,
            "sparsity": level,
            "optimizer": optimizer,
            "dtype": dtype,
            "theta_dtype": theta_dtype,
            "memory": budget,
            "modes": rows,
        }
        print_json(document)
    else:
        _tell(shapes, rows, level, optimizer, dtype, theta_dtype, budget)


def _dtype(name: str) -> torch.dtype:
    import torch

    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def row(
    shapes: Shapes,
    label: str,
    mode: str,
    bits: int,
    sparsity: float,
    optimizer: str,
    dtype: str,
    theta_dtype: str,
    budget: int | None,
) -> dict[str, Any]:
    """Bytes of one mode by kind, in total and per weight."""
    from resu.modules.memory import predict_memory

    sizes = dict.fromkeys(KINDS, 0)
    pruned = 0.0
    for layer in shapes.layers:
        report = predict_memory(
            [(layer.name, (layer.out_features, layer.in_features))],
            mode,
            sparsity,
            bits=bits,
            dtype=_dtype(dtype),
            theta_dtype=_dtype(theta_dtype),
            optimizer=optimizer,
        )
        pruned += layer.count * report.layers[0].sparsity * report.numel
        for kind, size in report.by_kind.items():
            if kind in sizes:
                sizes[kind] += layer.count * size
    sizes["other"] += shapes.others * _dtype(dtype).itemsize
    total = sum(sizes.values())
    return {
        "label": label,
        "mode": mode,
        "bits": bits if mode.startswith("qresu") else None,
        "sparsity": pruned / shapes.numel,
        "bytes": sizes,
        "total": total,
        "bytes_per_weight": total / shapes.numel,
        "fits": None if budget is None else total <= budget,
    }


def _tell(
    shapes: Shapes,
    rows: list[dict[str, Any]],
    sparsity: float,
    optimizer: str,
    dtype: str,
    theta_dtype: str,
    budget: int | None,
) -> None:
    from rich.table import Table

    title = (
        f"{format_count(shapes.numel)} weights at {100 * sparsity:g} % sparsity, {dtype}, "
        f"θ of the quantized modes {theta_dtype}, optimizer {optimizer}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("mode")
    kinds = [kind for kind in KINDS if any(row["bytes"][kind] for row in rows)]
    for name in (*(KINDS[kind] for kind in kinds), "total", "B/weight"):
        table.add_column(name, justify="right")
    if budget is not None:
        table.add_column(f"fits in {format_bytes(budget)}", justify="right")
    for found in rows:
        cells = [format_bytes(found["bytes"][kind]) if found["bytes"][kind] else "–" for kind in kinds]
        cells += [format_bytes(found["total"]), f"{found['bytes_per_weight']:.2f}"]
        if budget is not None:
            over = found["total"] - budget
            cells.append("yes" if over <= 0 else f"no, {format_bytes(over)} over")
        table.add_row(found["label"], *cells)
    console = stdout(140)
    console.print(table)
    console.print(
        "In RESU, gradients and optimizer state cover all weights, for θ lives in the dense weight. "
        "Activations and what exists only within a step come on top.",
        markup=False,
    )
