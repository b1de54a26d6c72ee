"""One self-contained page of a comparison: table, verdict and plots, as HTML with the images inside."""

from __future__ import annotations

import base64
import html
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from resu.cli._common import format_bytes, format_count, write_whole

if TYPE_CHECKING:
    from resu.experiments.quickstart import Comparison

__all__ = ["environment", "rows", "verdict_lines", "write_page"]

COLUMNS = ("method", "test accuracy", "sparsity", "zeros exact", "held while training", "on disk")


def rows(comparison: Comparison, disk: Mapping[str, int]) -> list[dict[str, Any]]:
    """One row of plain values per method, for tables and for machines."""
    from resu.experiments.quickstart import LABELS

    found = []
    for name, runs in comparison.runs.items():
        accuracies = [run.accuracy for run in runs]
        found.append(
            {
                "method": name,
                "label": LABELS[name],
                "accuracy_mean": mean(accuracies),
                "accuracy_std": stdev(accuracies) if len(runs) > 1 else None,
                "accuracies": accuracies,
                "val_accuracy_mean": mean(run.val for run in runs),
                "sparsity": runs[0].actual,
                "kept": runs[0].kept,
                "weights": runs[0].total,
                "zeros_exact": all(run.zeros_exact for run in runs),
                "held_bytes": max(run.held for run in runs),
                "disk_bytes": disk[name],
            }
        )
    return found


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row in words, in the order of :data:`COLUMNS`."""
    spread = "" if row["accuracy_std"] is None else f" ± {row['accuracy_std']:.1f}"
    dense = row["kept"] == row["weights"]
    return (
        row["label"],
        f"{row['accuracy_mean']:.1f}{spread} %",
        "0" if dense else f"{100 * row['sparsity']:.2f} % ({format_count(row['kept'])} kept)",
        "–" if dense else ("yes" if row["zeros_exact"] else "NO"),
        format_bytes(row["held_bytes"]),
        format_bytes(row["disk_bytes"]),
    )


def verdict_lines(comparison: Comparison) -> list[str]:
    """What the test accuracies say, and what they do not."""
    from resu.experiments.quickstart import LABELS
    from resu.experiments.verdicts import verdicts

    best, others = verdicts(
        {name: [run.correct for run in runs] for name, runs in comparison.runs.items() if name != "dense"}
    )

    def told(noise: bool) -> str:
        return ", ".join(
            f"{LABELS[v.method]} ({v.difference:+.1f} ± {2 * v.error:.1f})" for v in others if v.is_noise == noise
        )

    examples = comparison.runs[best][0].correct.numel()
    count = len(comparison.seeds)
    accuracy = mean(run.accuracy for run in comparison.runs[best])
    lines = [f"Highest mean test accuracy at {100 * comparison.sparsity:g} %: {LABELS[best]}, {accuracy:.1f} %."]
    if noise := told(True):
        lines.append(f"Not told apart from it by {examples} test examples and {count} seed(s), points: {noise}.")
    if worse := told(False):
        lines.append(f"Lower by more than the noise: {worse}.")
    if count == 1:
        lines.append("With one seed the noise is that of the test examples alone; use --seeds 3 or more.")
    return lines


def environment() -> dict[str, Any]:
    """What the numbers were made with."""
    import torch

    from resu import __version__

    return {
        "resu": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, 1 thread used",
    }


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1a1a1a;max-width:1080px;margin:2em auto;padding:0 1em}
h1{font-size:1.5em;margin-bottom:.2em}h2{font-size:1.1em;margin-top:1.6em}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.35em .7em;border-bottom:1px solid #ddd;text-align:right}
th:first-child,td:first-child{text-align:left}
th{border-bottom:2px solid #333}.plots{display:grid;grid-template-columns:1fr 1fr;gap:1em}
.plots img{width:100%}p.small{color:#555;font-size:.87em}tr.saved td{font-weight:600}
@media(max-width:800px){.plots{grid-template-columns:1fr}}
"""


def write_page(
    path: Path,
    title: str,
    lead: Sequence[str],
    table: Sequence[Mapping[str, Any]],
    saved: str,
    images: Mapping[str, bytes],
    small: Sequence[str],
) -> Path:
    """Write the page.

    Args:
        path: File to write.
        title: Heading.
        lead: Paragraphs above the plots.
        table: What :func:`rows` gave.
        saved: The method whose model was saved; its row is set off.
        images: ``{what it shows: PNG bytes}``.
        small: Notes below.
    """
    text = html.escape
    head = "".join(f"<th>{text(name)}</th>" for name in COLUMNS)
    body = "".join(
        f"<tr{' class=saved' if row['method'] == saved else ''}>"
        + "".join(f"<td>{text(cell)}</td>" for cell in cells(row))
        + "</tr>\n"
        for row in table
    )
    figures = "".join(
        f'<img alt="{text(name)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">\n'
        for name, data in images.items()
    )
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{text(title)}</h1>\n"
        + "".join(f"<p>{text(line)}</p>\n" for line in lead)
        + f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>\n"
        + f'<h2>Plots</h2>\n<div class="plots">\n{figures}</div>\n'
        + "".join(f'<p class="small">{text(line)}</p>\n' for line in small)
        + "</body></html>\n"
    )
    return write_whole(path, page.encode())
