"""``resu export``: a model for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from resu.cli._common import CliError, Force, Json, format_bytes, print_json, shown_progress, stdout

EXAMPLE = "Example: resu export pruned_model/ --to pack-quantized --out small_model/"

TARGETS = ("pack-quantized", "bitmask", "sparse-24", "dense", "onnx", "cerebras")


def command(
    source: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A model folder, in any layout of resu.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")],
    to: Annotated[
        str | None, typer.Option("--to", help=f"{', '.join(TARGETS[:-1])} or {TARGETS[-1]}.", metavar="KIND")
    ] = None,
    cerebras: Annotated[bool, typer.Option("--cerebras", help="The same as --to cerebras.")] = False,
    masks: Annotated[
        Path | None, typer.Option("--masks", help="Mask file; default: masks.safetensors beside the weights.")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option("--group-size", help="pack-quantized: columns that share a scale; default: a row.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", help="pack-quantized: layers that stay dense (glob; repeatable).")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option("--tolerance", help="onnx: how far outputs may differ, of the largest [1e-4].")
    ] = None,
    masks_as: Annotated[
        str | None, typer.Option("--masks-as", help="cerebras: zeros (of the weights) or tensors (of a checkpoint).")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a model in a form that other programs load.

    pack-quantized: 4-bit weights, pruned ones exactly 0, for vLLM and transformers with compressed-tensors. bitmask and
    sparse-24: kept values and one bit per weight. dense: zeros as zeros, for anything. onnx: model.onnx, compared with
    the model in ONNX Runtime. cerebras: weights with zeros, masks as checkpoint tensors, and the YAML that uses them.
    """
    kind = _kind(to, cerebras)
    options = {"--group-size": group_size, "--ignore": ignore, "--tolerance": tolerance, "--masks": masks}
    _check_options(kind, {**options, "--masks-as": masks_as})
    try:
        with shown_progress("exporting") as tick:
            always: dict[str, Any] = {"overwrite": force, "progress": tick}
            if kind == "onnx":
                from resu.integrations.hf_onnx import write_onnx

                limit = 1e-4 if tolerance is None else tolerance
                report = write_onnx(source, out, tolerance=limit, **always)
            elif kind == "pack-quantized":
                from resu.integrations.quantize import write_pack_quantized

                report = write_pack_quantized(
                    source, out, group_size=group_size, ignore=ignore or None, masks=masks, **always
                )
            elif kind == "cerebras":
                from resu.integrations.cerebras.export import write_cerebras

                report = write_cerebras(source, out, masks=masks, kind=masks_as or "zeros", **always)
            else:
                from resu.integrations.convert import convert

                report = convert(source, out, kind, masks=masks, **always)
    except FileExistsError as error:
        raise CliError(str(error).replace("overwrite=True", "--force")) from None
    if as_json:
        print_json(report)
        return
    console = stdout()
    console.print(f"{report['source']} → {report['out']}: {report['layout']}", markup=False, soft_wrap=True)
    for line in _lines(report):
        console.print(f"  {line}", markup=False, soft_wrap=True)


# Which options say something about which kinds.
_OPTIONS = {
    "--group-size": ("pack-quantized",),
    "--ignore": ("pack-quantized",),
    "--tolerance": ("onnx",),
    "--masks-as": ("cerebras",),
    "--masks": tuple(kind for kind in TARGETS if kind != "onnx"),
}


def _kind(to: str | None, cerebras: bool) -> str:
    if to is None and not cerebras:
        raise CliError(f"say what to export to: --to {' | '.join(TARGETS)}")
    if cerebras and to not in (None, "cerebras"):
        raise CliError(f"--cerebras and --to {to} are two targets; give one")
    kind = to or "cerebras"
    if kind not in TARGETS:
        raise CliError(f"cannot export to {kind!r}; known: {', '.join(TARGETS)}")
    return kind


def _check_options(kind: str, given: dict[str, Any]) -> None:
    for option, value in given.items():
        if value not in (None, []) and kind not in _OPTIONS[option]:
            raise CliError(f"{option} is for {', '.join(_OPTIONS[option])}, not for {kind}")


def _lines(report: dict[str, Any]) -> list[str]:
    """What there is to say of a report, whichever kind it is of."""
    lines = []
    if "total" in report:
        dense = f", {report['dense']} with a mask dense" if report.get("dense") else ""
        sparsity = f"; sparsity {100 * report['total']['sparsity']:.2f} %" if report["total"]["numel"] else ""
        lines.append(f"weights   {report['packed']} packed{dense}{sparsity}")
    if "bits" in report:
        error = report["error"]
        lines.append(f"bits      {report['bits']:.2f} per packed weight, scales included")
        lines.append(f"error     {error['mean']:.4f} of a weight's norm, at most {error['max']:.4f} ({error['worst']})")
        lines.append(f"dense     {', '.join(report['ignored']) or 'no linear layer'}")
    if "opset" in report:
        lines += [f"{way:9} {name} {shape}" for way in ("inputs", "outputs") for name, shape in report[way].items()]
        lines.append(f"error     {report['error']:.3g} where the largest output is {report['largest']:.3g}")
        lines.append(f"bytes     {format_bytes(report['bytes'])}, opset {report['opset']}")
    if "bytes_before" in report:
        lines.append(f"bytes     {format_bytes(report['bytes_before'])} → {format_bytes(report['bytes_after'])}")
    if "yaml" in report:
        lines.append(f"yaml      {report['yaml']}")
    return lines
