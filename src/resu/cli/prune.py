"""``resu prune``: a checkpoint in, a pruned one out that loads as the first did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resu.cli._common import (
    CALIBRATION_TEXT,
    CliError,
    Device,
    Force,
    Json,
    Length,
    Samples,
    describe_error,
    parse_sparsity,
    print_json,
    progress,
    require,
)
from resu.cli._pruned_layers import tell

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress

EXAMPLE = (
    "Example: resu prune ./llama --method wanda --sparsity 0.5 --calibration c4.jsonl --evaluate wikitext.txt "
    "--out ./llama-wanda-50"
)
DTYPES = ("float32", "bfloat16", "float16")


def command(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="A Hugging Face directory; without data any folder of safetensors, or one file."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    method: Annotated[
        str,
        typer.Option(
            help="Without data: magnitude, random, lamp. With --calibration: wanda, ria, sparsegpt, gradient, taylor, "
            "fisher, snip."
        ),
    ] = "magnitude",
    sparsity: Annotated[
        str | None,
        typer.Option(
            metavar="FLOAT", help="Fraction of the weights removed, in [0, 1); or GLOB=FLOAT,GLOB=FLOAT by layer."
        ),
    ] = None,
    pattern: Annotated[str | None, typer.Option(help="2:4 (N kept of M), row, tensor, block:16x1, channel:0.")] = None,
    distribution: Annotated[
        str | None,
        typer.Option(help="uniform, er, erk, global, lamp, owl; left out: every layer alike."),
    ] = None,
    calibration: Annotated[Path | None, CALIBRATION_TEXT] = None,
    samples: Samples = 128,
    length: Length = None,
    refine: Annotated[str | None, typer.Option(help="dsnot: swap weights in the mask afterwards.")] = None,
    update: Annotated[str | None, typer.Option(help="sparsegpt: adjust the weights that are kept.")] = None,
    include: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="What to prune; may be repeated.")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="What to leave dense; may be repeated.")
    ] = None,
    evaluate: Annotated[
        Path | None,
        typer.Option(help="Text: perplexity before and after (of an encoder: cosine of its sentence embeddings)."),
    ] = None,
    layout: Annotated[
        str, typer.Option(help="dense: zeros in place. bitmask: kept values and one bit per weight.")
    ] = "dense",
    workers: Annotated[int, typer.Option(min=1, help="Threads, for methods without data.")] = 1,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with an interrupted run (with data: if that one had --resume too)."),
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help=f"Of the result, for methods with data: {', '.join(DTYPES)}.")
    ] = None,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of calibration samples and random scores.")] = 0,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Prune a model directory into a new one that from_pretrained loads.

    Embeddings, norms and the output head stay dense unless --include names them. Beside the model there are
    masks.safetensors and pruning.json; configuration, tokenizer and other files are copied. The folder appears when
    it is whole.
    """
    level = None if sparsity is None else parse_sparsities(sparsity)
    if not model.exists():
        raise CliError(f"there is no file or folder {model}")
    if calibration is not None or evaluate is not None:
        require("transformers", "hf")
    from resu.integrations.hf_prune import prune_directory

    with progress() as bar, as_options():
        report = prune_directory(
            model,
            out,
            level,
            method,
            pattern=pattern,
            distribution=distribution,
            calibration=calibration,
            samples=samples,
            length=length,
            refine=refine,
            update=update,
            include=include or None,
            exclude=exclude or None,
            evaluate=evaluate,
            layout=layout,
            workers=workers,
            resume=resume,
            overwrite=force,
            dtype=parse_dtype(dtype),
            device=parse_device(device),
            seed=seed,
            progress=shown_by(bar),
        )
    if as_json:
        print_json({**report, "out": str(out)})
    else:
        tell(report, out)


@contextmanager
def as_options() -> Iterator[None]:
    """Advice in errors with the names of options in place of those of arguments."""
    try:
        yield
    except (OSError, ValueError) as error:
        said = describe_error(error)
        told = said.replace("overwrite=True", "--force").replace("resume=True", "--resume")
        if told == said:
            raise
        raise CliError(told) from None


def shown_by(bar: Progress) -> Callable[[int, int, str], None]:
    """A callback that draws a line per kind of work; a new kind is one with another total, or that starts again."""
    task, last, of = None, 0, -1

    def show(done: int, total: int, what: str) -> None:
        nonlocal task, last, of
        if task is None or total != of or done < last:
            task, of = bar.add_task(what, total=total), total
        last = done
        bar.update(task, description=what, completed=done)

    return show


# -- options -------------------------------------------------------------------------------------------


def parse_sparsities(text: str) -> float | dict[str, float]:
    """A sparsity, or one per glob.

    Example:
        >>> parse_sparsities("0.5"), parse_sparsities("*.mlp.*=0.7,*=0.5")
        (0.5, {'*.mlp.*': 0.7, '*': 0.5})
    """
    if "=" not in text:
        return parse_sparsity(text)
    found: dict[str, float] = {}
    for item in text.split(","):
        glob, equals, value = item.strip().rpartition("=")
        if not equals or not glob or glob in found:
            raise CliError(f"--sparsity items are GLOB=FLOAT, each glob once; got {item.strip()!r}")
        found[glob] = parse_sparsity(value, f"--sparsity of {glob}")
    return found


def parse_dtype(name: str | None) -> torch.dtype | None:
    """A float dtype by its name in torch."""
    if name is None:
        return None
    if name not in DTYPES:
        raise CliError(f"unknown --dtype {name!r}; known: {', '.join(DTYPES)}")
    import torch

    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def parse_device(name: str | None) -> torch.device | None:
    """A device that is there.

    Raises:
        CliError: If torch does not know it, or it is not in this machine.
    """
    if name is None:
        return None
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # each backend has its own kind
        raise CliError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device
