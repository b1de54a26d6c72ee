"""``resu shrink``: a transformer in, a physically smaller one out."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resu.cli._common import (
    CALIBRATION_TEXT,
    CliError,
    Device,
    Force,
    Json,
    Length,
    Samples,
    format_bytes,
    format_count,
    print_json,
    progress,
    require,
    stdout,
)
from resu.cli.prune import as_options, parse_device, shown_by

if TYPE_CHECKING:
    from resu.integrations.shrink.targets import Target

EXAMPLE = "Example: resu shrink ./minilm --target-latency 0.5x --data sentences.txt --out ./minilm-small"


def command(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A Hugging Face directory.")],
    out: Annotated[Path | None, typer.Option(help="The folder to write.")] = None,
    target_latency: Annotated[
        str | None, typer.Option(metavar="X", help="Time of a forward pass here, of the present one: 0.5x.")
    ] = None,
    params: Annotated[str | None, typer.Option(metavar="X", help="Parameters that stay, of the present: 0.5.")] = None,
    macs: Annotated[str | None, typer.Option(metavar="X", help="Multiply-adds that stay, of the present.")] = None,
    heads: Annotated[
        str | None, typer.Option(metavar="X", help="Attention heads removed from every block: 0.33 or 1/3.")
    ] = None,
    ffn: Annotated[str | None, typer.Option(metavar="X", help="Feed-forward width removed from every block.")] = None,
    depth: Annotated[int, typer.Option(min=0, help="Whole blocks removed.")] = 0,
    method: Annotated[
        str | None, typer.Option(help="taylor, activation (with --data); l2, l1, random. Left out: taylor, or l2.")
    ] = None,
    data: Annotated[Path | None, CALIBRATION_TEXT] = None,
    samples: Samples = 128,
    length: Length = None,
    evaluate: Annotated[
        Path | None, typer.Option(help="Text to measure quality on before and after; left out: --data.")
    ] = None,
    update: Annotated[
        str | None,
        typer.Option(
            help="least-squares: fit the layers that read what is left, on --data; sequential: after that each layer, "
            "in order, to what the model before has in its residual stream."
        ),
    ] = None,
    round_to: Annotated[int, typer.Option(min=1, help="The width that stays is a multiple of it.")] = 8,
    shape: Annotated[
        str | None,
        typer.Option(metavar="ROWSxTOKENS", help="What multiply-adds and latency are measured on; left out: 1x128."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="What 10, 30 and 50 % of each part would cost on --data; write nothing.")
    ] = False,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of calibration samples and random numbers.")] = 0,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Remove heads, feed-forward width and blocks of a transformer, so that any runtime is faster.

    With a target one fraction of heads and width is found that meets it; what is given by --heads or --ffn stays as
    given. After the removal the model is compared with the masked one in float64, or nothing is written. The folder
    loads with from_pretrained, or with resu.load_shrunk_transformer where the architecture has no place for its sizes
    (heads of BERT); resu finetune brings quality back.
    """
    if not model.exists():
        raise CliError(f"there is no file or folder {model}")
    for file, option in ((data, "--data"), (evaluate, "--evaluate")):
        if file is not None and not file.exists():
            raise CliError(f"{option} {file} does not exist")
    require("transformers", "hf")
    from resu.integrations.shrink.directory import sensitivity_of_directory, shrink_directory
    from resu.integrations.shrink.settings import ShrinkConfig

    rows, tokens = parse_shape(shape)
    with as_options():
        config = ShrinkConfig(
            heads=parse_fraction(heads, "--heads"),
            ffn=parse_fraction(ffn, "--ffn"),
            depth=depth,
            target=parse_target({"latency": target_latency, "params": params, "macs": macs}),
            method=method,
            data=data,
            samples=samples,
            length=length,
            evaluate=evaluate,
            update=update,
            round_to=round_to,
            batch=rows,
            tokens=tokens,
            seed=seed,
        )
    if not dry_run and out is None:
        raise CliError("--out is missing: name the folder to write, or pass --dry-run")
    with progress() as bar, as_options():
        where, shown = parse_device(device), shown_by(bar)
        if dry_run:
            report = sensitivity_of_directory(model, config, device=where, progress=shown)
        else:
            assert out is not None
            report = shrink_directory(model, out, config, overwrite=force, device=where, progress=shown)
            report["out"] = str(out)
    if as_json:
        print_json(report)
    elif dry_run:
        _tell_sensitivity(report)
    else:
        _tell(report)


# -- options -------------------------------------------------------------------------------------------


def parse_fraction(text: str | None, option: str) -> Fraction | None:
    """A fraction in [0, 1), exactly as it was written.

    Example:
        >>> parse_fraction("1/3", "--heads"), parse_fraction("0.5", "--ffn"), parse_fraction(None, "--ffn")
        (Fraction(1, 3), Fraction(1, 2), None)
    """
    if text is None:
        return None
    try:
        value = Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        raise CliError(f"{option} must be a fraction in [0, 1) such as 0.5 or 1/3, got {text!r}") from None
    if not 0 <= value < 1:
        raise CliError(f"{option} must lie in [0, 1), got {text!r}; it is the fraction removed")
    return value


def parse_target(given: Mapping[str, str | None]) -> Target | None:
    """The one target that is given, as a part of the present cost.

    Raises:
        CliError: If there are several, or it is no number in (0, 1).
    """
    from resu.integrations.shrink.targets import Target

    options = {"latency": "--target-latency", "params": "--params", "macs": "--macs"}
    named = {metric: text for metric, text in given.items() if text is not None}
    if len(named) > 1:
        raise CliError(f"give one target, not {' and '.join(options[metric] for metric in named)}")
    for metric, text in named.items():
        cleaned = text.strip().lower().removesuffix("x")
        try:
            value = float(Fraction(cleaned))
        except (ValueError, ZeroDivisionError):
            value = -1.0
        if not 0 < value < 1:
            raise CliError(
                f"{options[metric]} must lie in (0, 1), got {text!r}; 0.5 means half of what the model costs now"
            )
        return Target(metric, value)
    return None


def parse_shape(text: str | None) -> tuple[int, int | None]:
    """Rows and tokens.

    Example:
        >>> parse_shape("8x64"), parse_shape(None)
        ((8, 64), (1, None))
    """
    if text is None:
        return 1, None
    rows, cross, tokens = text.lower().replace("×", "x").partition("x")
    if not (cross and rows.strip().isdecimal() and tokens.strip().isdecimal() and int(rows) > 0 and int(tokens) > 0):
        raise CliError(f"--shape must be rows and tokens such as 1x128, got {text!r}")
    return int(rows), int(tokens)


# -- output --------------------------------------------------------------------------------------------


def _tell(report: Mapping[str, Any]) -> None:
    from rich.table import Table

    before, after = report["sizes"]["before"], report["sizes"]["after"]
    latency = report["latency"]
    rows, tokens = report["inputs"]
    table = Table("", "before", "after", "", show_edge=True)
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("blocks", str(len(before["ffn"])), str(len(after["ffn"])), "")
    for kind, name in (("heads", "heads per block"), ("ffn", "feed-forward width")):
        table.add_row(name, _one(before[kind]), _one(after[kind]), "")
    for key, name in (("parameters", "parameters"), ("macs", f"multiply-adds ({rows}×{tokens} tokens)")):
        a, b = report[key]["before"], report[key]["after"]
        table.add_row(name, format_count(a), format_count(b), f"{b / a:.3f}x")
    table.add_row(
        f"forward pass ({rows}×{tokens} tokens)",
        f"{1000 * latency['before']:.4g} ms",
        f"{1000 * latency['after']:.4g} ms",
        f"{latency['ratio']:.3f}x",
    )
    if found := report.get("evaluation"):
        label = {"perplexity": "perplexity", "accuracy": "accuracy", "cosine": "cosine of embeddings"}[found["metric"]]
        table.add_row(label, f"{found['before']:.4g}", f"{found['after']:.4g}", "")
    console = stdout()
    console.print(table)
    lines = []
    if target := report["target"]:
        lines.append(f"target: {target['metric']} {target['wanted']:g}x, reached {target['reached']:.3f}x")
    lines.append(f"equals the masked model to {report['verified']:.1e} (relative, float64)")
    if report["loads_with"] != "from_pretrained":
        lines.append(
            f"note: the architecture has no place for these sizes; load it with {report['loads_with']}, not with "
            "from_pretrained"
        )
    lines += [f"note: {line}" for line in report["warnings"]]
    lines.append(f"{report['out']}: {format_bytes(report['bytes'])} of weights, {report['seconds']:.1f} s")
    console.print("\n".join(lines), markup=False, soft_wrap=True)


def _one(sizes: list[int]) -> str:
    low, high = min(sizes), max(sizes)
    return str(low) if low == high else f"{low} to {high}"


def _tell_sensitivity(report: Mapping[str, Any]) -> None:
    from rich.table import Table

    levels = [value["removed"] for value in report["rows"][0]["values"]]
    table = Table("block", "part", "of", *[f"{100 * level:g} % removed" for level in levels])
    for column in table.columns[2:]:
        column.justify = "right"
    for row in report["rows"]:
        shown = ["–" if value["value"] is None else f"{value['value']:.4g}" for value in row["values"]]
        if row["kind"] == "block":
            shown = [*[""] * (len(levels) - 1), f"whole: {shown[0]}"]
        part = {"heads": "heads", "ffn": "width", "block": "block"}[row["kind"]]
        table.add_row(str(row["block"]), part, str(row["count"]), *shown)
    console = stdout()
    console.print(table)
    label = {"perplexity": "perplexity", "cosine": "cosine of embeddings"}[report["metric"]]
    console.print(
        f"{label}, {report['dense']:.4g} as it is; units of least {report['method']} score are silenced, nothing was "
        "written",
        markup=False,
        soft_wrap=True,
    )
