"""``resu finetune``: a model directory and a text in, a fine-tuned directory out."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resu.cli._common import (
    CliError,
    Force,
    Json,
    describe_error,
    fail,
    format_bytes,
    format_count,
    parse_sparsity,
    print_json,
    progress,
    require,
    stdout,
)
from resu.cli.prune import shown_by

if TYPE_CHECKING:
    from resu.integrations.finetune.config import FinetuneConfig

EXAMPLE = (
    "Example: resu finetune ./minilm --method qresu --sparsity 0.5 --data train.csv --validation dev.csv "
    "--out ./minilm-tuned"
)
_TRAIN, _PRUNE, _METHOD, _RUN = "Training", "What is pruned", "Of a method", "Run"


def _option(panel: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


def command(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A Hugging Face directory.")],
    data: Annotated[
        Path,
        typer.Option(
            help='Text to train on: .txt, .jsonl ({"text": …}, or with "label"), .csv or .tsv (text, label); also .xz. '
            "With --task classification a line of a .txt is: label, space, text."
        ),
    ],
    method: Annotated[
        str, typer.Option(help="resu, qresu, qresu-selective, sparse-lora, lora, masked or full.")
    ] = "resu",
    out: Annotated[Path | None, typer.Option(help="The folder to write.")] = None,
    task: Annotated[
        str, typer.Option(help="causal-lm, masked-lm, classification; auto: by the data and the model.")
    ] = "auto",
    validation: Annotated[Path | None, typer.Option(help="Text to evaluate on; left out: a share of --data.")] = None,
    validation_share: Annotated[float, typer.Option(help="That share, which is held out.")] = 0.1,
    encoding: Annotated[str, typer.Option(help="Of the text files.")] = "utf-8",
    length: Annotated[int | None, typer.Option(help="Tokens per sample; left out: the model's, at most 512.")] = None,
    sparsity: Annotated[
        str | None, _option(_PRUNE, "Fraction of the weights that is pruned, in [0, 1).", metavar="FLOAT")
    ] = None,
    mask: Annotated[
        str | None,
        _option(_PRUNE, "A mask file, or zeros; left out: --sparsity, or the masks beside the model.", metavar="FILE"),
    ] = None,
    prune_method: Annotated[str, _option(_PRUNE, "magnitude, wanda, ria, … (calibrated on --data).")] = "magnitude",
    pattern: Annotated[str | None, _option(_PRUNE, "2:4 (N kept of M), row, block:16x1; left out: free.")] = None,
    samples: Annotated[int, _option(_PRUNE, "Training samples that calibrate.")] = 128,
    include: Annotated[
        list[str] | None, _option(_PRUNE, "What to prune and train; may be repeated.", metavar="GLOB")
    ] = None,
    exclude: Annotated[list[str] | None, _option(_PRUNE, "What to leave out; may be repeated.", metavar="GLOB")] = None,
    theta_init: Annotated[
        str, _option(_METHOD, "θ starts as the pruned weights (weight), at zeros, or at random (normal).")
    ] = "weight",
    epsilon: Annotated[float, _option(_METHOD, "Size of θ's random start, relative to the weights.")] = 0.1,
    bits: Annotated[int | None, _option(_METHOD, "Of frozen weights: 4 or 8 (qresu: 4; sparse-lora: none).")] = None,
    theta_dtype: Annotated[str | None, _option(_METHOD, "Of θ under qresu: float32 or bfloat16.")] = None,
    commit: Annotated[
        str, _option(_METHOD, "θ joins the weights: dense; sparse or amnesty: the count of the mask is kept.")
    ] = "dense",
    resurrected: Annotated[float, _option(_METHOD, "Largest share of θ under --commit amnesty.")] = 0.1,
    rank: Annotated[int, _option(_METHOD, "Of low-rank updates.")] = 16,
    alpha: Annotated[float, _option(_METHOD, "Their scale is alpha / rank.")] = 32.0,
    dropout: Annotated[float, _option(_METHOD, "In low-rank updates.")] = 0.05,
    lora_mode: Annotated[str, _option(_METHOD, "sparse_to_sparse, sparse_to_dense or scale.")] = "sparse_to_sparse",
    keep_adapter: Annotated[bool, _option(_METHOD, "Also write OUT/adapter.", "--keep-adapter")] = False,
    train_norms: Annotated[bool, _option(_METHOD, "Norms train beside.", "--train-norms")] = False,
    train_biases: Annotated[bool, _option(_METHOD, "Biases train beside.", "--train-biases")] = False,
    train_head: Annotated[bool, _option(_METHOD, "The output head trains beside.", "--train-head")] = False,
    epochs: Annotated[float, _option(_TRAIN, "Passes over the data.")] = 3.0,
    steps: Annotated[int | None, _option(_TRAIN, "Optimizer steps, instead of epochs.")] = None,
    batch_size: Annotated[int, _option(_TRAIN, "Samples per forward pass and process.")] = 16,
    accumulate: Annotated[int, _option(_TRAIN, "Forward passes per step.")] = 1,
    learning_rate: Annotated[float | None, _option(_TRAIN, "Left out: one for the method.")] = None,
    weight_decay: Annotated[float, _option(_TRAIN, "Of what trains, but norms and biases.")] = 0.0,
    warmup: Annotated[float, _option(_TRAIN, "Share of the steps over which the step size grows.")] = 0.1,
    schedule: Annotated[str, _option(_TRAIN, "linear, cosine or constant.")] = "linear",
    clip: Annotated[float, _option(_TRAIN, "Largest norm of the gradient; 0: none.")] = 1.0,
    optimizer: Annotated[str, _option(_TRAIN, "adamw, adamw8bit, adafactor or sgd.")] = "adamw",
    in_backward: Annotated[
        bool,
        _option(
            _TRAIN, "Update each weight as its gradient arrives (--clip 0).", "--update-in-backward", "--in-backward"
        ),
    ] = False,
    dtype: Annotated[str | None, _option(_TRAIN, "Of the weights; left out: as stored.")] = None,
    bf16: Annotated[bool, _option(_TRAIN, "Multiply in bfloat16 (autocast).", "--bf16")] = False,
    gradient_checkpointing: Annotated[
        bool, _option(_TRAIN, "Compute activations twice instead of keeping them.", "--gradient-checkpointing")
    ] = False,
    shard: Annotated[
        bool, _option(_TRAIN, "Processes divide the model among them (FSDP2); for torchrun.", "--shard")
    ] = False,
    save_steps: Annotated[int | None, _option(_RUN, "A checkpoint after so many steps.")] = None,
    evaluate_steps: Annotated[int | None, _option(_RUN, "An evaluation after so many steps.")] = None,
    compare: Annotated[bool, _option(_RUN, "Evaluate the model also as it was and as it is saved.")] = True,
    seed: Annotated[int, _option(_RUN, "Of all that is random.")] = 0,
    device: Annotated[str | None, _option(_RUN, "cpu or cuda; left out: what is there.")] = None,
    max_shard_size: Annotated[str, _option(_RUN, "Largest weight file.")] = "5GB",
    resume: Annotated[bool, _option(_RUN, "Go on with an interrupted run, bit for bit.", "--resume")] = False,
    dry_run: Annotated[bool, _option(_RUN, "Print the settings in full and leave.", "--dry-run")] = False,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Fine-tune a model in the memory you have, and keep its sparsity.

    The folder gets what from_pretrained loads, masks.safetensors where the result is sparse, log.csv, and run.json with
    settings, evaluation before and after, and memory. OUT.training beside it holds checkpoints while it trains, also
    after Ctrl-C. Under torchrun each process takes its part of every batch, and with --shard they divide the
    model among them too (FSDP2).
    """
    # The allocator tells torch's log of blocks from before a measurement; read before torch is loaded.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    given = dict(locals())
    require("transformers", "hf")
    require("accelerate", "accelerate")
    for path in (model, data, validation):
        if path is not None and not path.exists():
            raise CliError(f"there is no file or folder {path}")
    from resu.integrations.finetune.config import FinetuneConfig

    names = [name for name in FinetuneConfig.__dataclass_fields__ if name in given]
    values = {name: given[name] for name in names} | {
        "source": model,
        "sparsity": None if sparsity is None else parse_sparsity(sparsity),
        "include": tuple(include or ()),
        "exclude": tuple(exclude or ()),
        "autocast": "bfloat16" if bf16 else None,
    }
    config = FinetuneConfig(**values)
    if dry_run:
        _print_settings(config, as_json)
        return
    if out is None:
        raise CliError("--out is missing: name the folder to write")
    if resume and force:
        raise CliError("--resume goes on with a run and --force replaces it; give one of them")
    first = os.environ.get("RANK", "0") == "0"
    with _unlogged():
        from resu.integrations.finetune.run import Interrupted, finetune
    try:
        with progress() as bar, _as_options():
            report = finetune(
                config,
                out,
                resume=resume,
                overwrite=force,
                keep_adapter=keep_adapter,
                max_shard_size=max_shard_size,
                progress=shown_by(bar) if first else None,
            )
    except Interrupted as stop:
        fail(f"{stop}; go on with the same command and --resume", 130)
    except FloatingPointError as error:
        fail(str(error), 1)
    finally:
        _end_processes()
    if not first:
        return
    if as_json:
        print_json({**report, "out": str(out)})
    else:
        _tell(report, out)


@contextmanager
def _unlogged() -> Iterator[None]:
    """Without what libraries log while they are loaded, of parts that they miss and nobody asked for."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _end_processes() -> None:
    """Take down what torchrun's processes were joined by."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def _as_options() -> Iterator[None]:
    """Advice in errors with the names of options in place of those of arguments."""
    try:
        yield
    except (OSError, ValueError) as error:
        said = describe_error(error)
        told = said.replace("overwrite=True", "--force").replace("resume=True", "--resume")
        if told == said:
            raise
        raise CliError(told) from None


def _print_settings(config: FinetuneConfig, as_json: bool) -> None:
    values = config.to_json() | {"learning_rate": config.step_size}
    if as_json:
        print_json(values)
        return
    for name, value in values.items():
        print(f"{name.replace('_', '-')}: {value}")


def _tell(report: Mapping[str, Any], out: Path) -> None:
    found, metric = report["evaluation"], report["evaluation"]["metric"]
    unit, scale = (" %", 100.0) if metric == "accuracy" else ("", 1.0)
    shown = {"source": "as it was", "start": "at the start", "end": "at the end", "saved": "as saved"}
    parts = [f"{scale * found[key][metric]:.4g}{unit} {text}" for key, text in shown.items() if found.get(key)]
    lines = [
        f"{report['method']} on {report['task']}: {report['steps']} steps, {report['seconds']:.0f} s",
        f"  {metric}: {', '.join(parts)}",
        f"  trained {format_count(report['trained'])} of {format_count(report['parameters'])} values",
    ]
    if report["sparsity"]:
        lines.append(f"  sparsity {report['sparsity']:.6g} of the pruned layers")
    if memory := report["memory"]:
        lines.append(
            f"  memory of a step: {format_bytes(memory['peak'])} at most, {format_bytes(memory['state'])} of it for "
            "weights, masks and optimizer state"
        )
    lines += [f"  note: {note}" for note in report["notes"]]
    lines.append(f"\n{out}: {format_bytes(report['bytes'])} of weights; settings and results in run.json")
    stdout().print("\n".join(lines), markup=False, soft_wrap=True)
