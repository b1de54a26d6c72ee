"""Tables and a plot of :mod:`resu.experiments.toolbox`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from resu.experiments.plots import draw_accuracy, legend_below, new_figure, to_png
from resu.experiments.render import BEGIN, END, around_marks, write_page
from resu.experiments.toolbox import Result

__all__ = ["markdown", "plot", "render"]

_VALUES = {"as it is": "accuracy", "BatchNorm recalibrated": "recalibrated"}


def _latest(results: Sequence[Result]) -> list[Result]:
    """Rows of the recipe and images of the last one: only what ran alike is compared."""
    last = results[-1]
    found = [r for r in results if (r.recipe, r.images) == (last.recipe, last.images)]
    return list({r.key: r for r in found}.values())


def _ways(results: Sequence[Result]) -> list[tuple[str, str]]:
    """Score and allocation, in the order of the first rows; dense left out."""
    pairs = dict.fromkeys((r.score, r.allocation) for r in results if r.sparsity > 0)
    scores = list(dict.fromkeys(score for score, _ in pairs))
    return sorted(pairs, key=lambda pair: scores.index(pair[0]))


def _mean(results: Sequence[Result], score: str, allocation: str, sparsity: float, field: str) -> float | None:
    found = [
        float(getattr(r, field))
        for r in results
        if (r.score, r.allocation, r.sparsity) == (score, allocation, sparsity)
    ]
    return fmean(found) if found else None


def markdown(results: Sequence[Result]) -> str:
    """Scores and budgets down, sparsities across; each cell without and with recalibration, the best in bold."""
    results = _latest(results)
    levels, ways = sorted({r.sparsity for r in results} - {0.0}), _ways(results)
    best = {
        (s, field): max((v for w in ways if (v := _mean(results, *w, s, field)) is not None), default=None)
        for s in levels
        for field in _VALUES.values()
    }
    lines = [["score", "budget", *(f"{100 * s:g} %" for s in levels)]]
    lines.append(["---"] * len(lines[0]))
    for way in ways:
        cells = []
        for s in levels:
            texts = []
            for field in _VALUES.values():
                value = _mean(results, *way, s, field)
                text = "–" if value is None else f"{value:.1f}"
                texts.append(f"**{text}**" if value is not None and value == best[s, field] else text)
            cells.append(" / ".join(texts))
        lines.append([*way, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(results: Sequence[Result], path: Path, budgets: Sequence[str] = ("uniform", "erk", "global")) -> None:
    """Accuracy against sparsity: one column of panels per budget, one row without and one with recalibration."""
    results = _latest(results)
    dense = [r for r in results if r.sparsity == 0]
    scores = list(dict.fromkeys(r.score for r in results if r.sparsity > 0))
    figure = new_figure(5.2 * len(budgets), 8.4)
    for row, (title, field) in enumerate(_VALUES.items()):
        for column, budget in enumerate(budgets):
            axes = figure.add_subplot(2, len(budgets), row * len(budgets) + column + 1)
            curves: dict[str, dict[float, list[float]]] = {}
            for score in scores:
                for r in results:
                    if (r.score, r.allocation) == (score, budget) and r.sparsity > 0:
                        curves.setdefault(score, {}).setdefault(r.sparsity, []).append(float(getattr(r, field)))
            draw_accuracy(axes, curves, [float(getattr(r, field)) for r in dense], f"{budget}: {title}")
            axes.set_ylim(0, 100)
    legend_below(figure, columns=len(scores) + 1)
    scratch = path.with_suffix(".part.png")
    scratch.write_bytes(to_png(figure, dpi=90))
    os.replace(scratch, path)


def render(results: Sequence[Result], page: Path) -> None:
    """Write the table between the marks of ``page``, and the plot beside it.

    Raises:
        ValueError: If there is no result, or an existing page has no marks.
    """
    if not results:
        raise ValueError("no result: run the study first, or name its file with --csv")
    before, after = around_marks(page, "Pruners")
    image = page.with_name("resnet20_pruning.png")
    plot(results, image)
    shown = _latest(results)
    dense = next((r for r in shown if r.sparsity == 0), None)
    exact = "Counts and zeros of every run are exact." if all(r.exact for r in shown) else "NOT every run is exact."
    level = f" Dense: {dense.accuracy:.1f} / {dense.recalibrated:.1f}." if dense else ""
    note = (
        f"Accuracy in percent on {shown[-1].images} test images, with the trained BatchNorm statistics / with "
        f"recalibrated ones.{level} {exact}"
    )
    body = f"{note}\n\n![Accuracy against sparsity]({image.name})\n\n{markdown(results)}"
    write_page(page, f"{before}{BEGIN}\n\n{body}\n\n{END}{after}")
