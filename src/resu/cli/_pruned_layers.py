"""What ``resu prune`` says of its result: a table of layers, like ones as one row where there are many."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resu.cli._common import format_bytes, format_count, stdout

_MANY_LAYERS = 64


def collapse(name: str) -> str:
    """A parameter's name with the numbers of blocks and experts left open.

    Example:
        >>> collapse("model.layers.31.mlp.experts.7.up_proj.weight")
        'model.layers.*.mlp.experts.*.up_proj.weight'
    """
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts block 2 before block 10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in name.split(".")]


def grouped(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of like layers as one each, with the lowest and highest sparsity among them."""
    groups: dict[tuple[str, tuple[int, ...]], list[dict[str, Any]]] = {}
    for layer in layers:
        groups.setdefault((collapse(layer["name"]), tuple(layer["shape"])), []).append(layer)
    return [
        {
            "name": f"{name} ({len(group)})",
            "shape": shape,
            "kept": sum(layer["kept"] for layer in group),
            "numel": sum(layer["numel"] for layer in group),
            "low": min(layer["sparsity"] for layer in group),
            "high": max(layer["sparsity"] for layer in group),
        }
        for (name, shape), group in groups.items()
    ]


def _percent(low: float, high: float) -> str:
    a, b = f"{100 * low:.2f}", f"{100 * high:.2f}"
    return f"{a} %" if a == b else f"{a} – {b} %"


def left_out(skipped: Mapping[str, str]) -> list[str]:
    """What stays dense and why, like weights together.

    Example:
        >>> left_out({"h.0.wpe.weight": "embedding", "h.1.wpe.weight": "embedding", "lm_head.weight": "output head"})
        ['h.*.wpe.weight (2): embedding', 'lm_head.weight: output head']
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, reason in skipped.items():
        groups.setdefault((collapse(name), reason), []).append(name)
    return [
        f"{names[0] if len(names) == 1 else f'{pattern} ({len(names)})'}: {reason}"
        for (pattern, reason), names in groups.items()
    ]


def tell(report: Mapping[str, Any], out: Path) -> None:
    """Print the table of layers, what stays dense, notes, quality and the folder."""
    from rich.markup import escape
    from rich.table import Table

    layers: list[dict[str, Any]] = sorted(report["layers"], key=lambda layer: _natural(layer["name"]))
    rows = grouped(layers) if len(layers) > _MANY_LAYERS else layers
    kept, numel = sum(layer["kept"] for layer in layers), sum(layer["numel"] for layer in layers)
    table = Table(show_footer=True)
    table.add_column("weight", f"{len(layers)} pruned", overflow="fold")
    table.add_column("shape", justify="right")
    table.add_column("kept", format_count(kept), justify="right")
    table.add_column("of", format_count(numel), justify="right")
    table.add_column("sparsity", f"{100 * report['actual']:.2f} %", justify="right")
    for row in rows:
        table.add_row(
            escape(row["name"]),
            "×".join(map(str, row["shape"])),
            format_count(row["kept"]),
            format_count(row["numel"]),
            _percent(row["low"], row["high"]) if "low" in row else _percent(row["sparsity"], row["sparsity"]),
        )
    console = stdout()
    console.print(table)
    for line in left_out(report["skipped"]):
        console.print(f"left dense: {line}", markup=False, soft_wrap=True)
    for line in report["warnings"]:
        console.print(f"note: {line}", markup=False, soft_wrap=True)
    if found := report.get("evaluation"):
        label = {"perplexity": "perplexity", "cosine": "cosine similarity of embeddings"}[found["metric"]]
        console.print(
            f"{label} on {found['file']}: {found['before']:.4g} before, {found['after']:.4g} after",
            markup=False,
            soft_wrap=True,
        )
    console.print(
        f"{out}: {format_bytes(report['bytes'])} of weights, {100 * report['total']:.2f} % of all parameters removed, "
        f"{report['seconds']:.1f} s",
        markup=False,
        soft_wrap=True,
    )
