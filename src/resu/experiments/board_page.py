"""The leaderboard for readers: texts of its figures, a page, two plots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from resu.experiments.board import Board, Line, lines
from resu.experiments.plots import COLOURS, MARKERS, draw_accuracy, legend_below, new_figure, tidy, to_png
from resu.experiments.train.evaluation import higher_is_better

__all__ = ["HEAD", "cells", "draw_flops", "markdown", "plot_flops", "plot_sparsity"]

HEAD = ("sparsity", "method", "test", "held out", "seeds", "training FLOPs", "inference FLOPs", "tried", "exact")
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
_DIGITS = {"accuracy": 2, "loss": 4, "perplexity": 2}
_AXES = {
    "accuracy": "test accuracy (%)",
    "loss": "test loss (nats), lower is better",
    "perplexity": "test perplexity, lower is better",
}


def cells(line: Line) -> tuple[str, ...]:
    """A line as the texts of :data:`HEAD`; FLOPs are against dense, ``tried`` is R_s."""
    digits = _DIGITS.get(line.metric, 3)
    spread = f" ± {line.std:.{digits}f}" if line.seeds > 1 else ""

    def share(value: float | None) -> str:
        return "–" if value is None else f"{value:.3g}"

    return (
        f"{100 * line.sparsity:g} %",
        line.method,
        f"{line.mean:.{digits}f}{spread}",
        f"{line.val:.{digits}f}",
        str(line.seeds),
        share(line.training_flops),
        share(line.inference_flops),
        share(line.explored),
        "yes" if line.exact else "NO",
    )


def markdown(found: Sequence[Board], images: Sequence[str] = ()) -> str:
    """The whole page; the best method at each sparsity is bold."""
    parts = ["# Leaderboard", *(f"![{name}]({name})" for name in images)]
    for board in found:
        head = [f"## {board.title}", f"{board.metric}; {board.recipe}"]
        rows = [HEAD, ("---",) * len(HEAD)]
        for line in lines(board):
            texts = cells(line)
            rows.append(tuple(f"**{text}**" for text in texts[1:3]) if line.best else texts[1:3])
            rows[-1] = (texts[0], *rows[-1], *texts[3:])
        settings = dict.fromkeys(f"- {line.method}: `{line.settings}`" for line in lines(board))
        table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        parts += [*head, table, "Settings:", "\n".join(sorted(settings))]
    return "\n\n".join(parts) + "\n"


def _methods(found: Sequence[Board]) -> list[str]:
    """All methods that have a sparsity, in order: each has the same colour in every panel."""
    return sorted({name for board in found for name, row in board.cells.items() if set(row) != {0.0}})


def _panels(found: Sequence[Board]) -> tuple[Any, list[Any]]:
    columns = min(2, len(found))
    height = -(-len(found) // columns)
    figure = new_figure(7.0 * columns, 4.8 * height + 0.8)
    return figure, [figure.add_subplot(height, columns, i + 1) for i in range(len(found))]


def _dense(board: Board) -> tuple[float, ...]:
    return next((row[0.0].values for row in board.cells.values() if 0.0 in row), ())


def plot_sparsity(found: Sequence[Board]) -> bytes:
    """The metric against sparsity, one panel per board: means over seeds, from the lowest to the highest."""
    figure, panels = _panels(found)
    methods = _methods(found)
    for axes, board in zip(panels, found, strict=True):
        curves = {m: {s: c.values for s, c in board.cells.get(m, {}).items() if s > 0} for m in methods}
        draw_accuracy(axes, curves, _dense(board), board.title, _AXES[board.metric])
    legend_below(figure, columns=5)
    return to_png(figure)


def plot_flops(found: Sequence[Board]) -> bytes:
    """The metric against the FLOPs of training, one panel per board."""
    figure, panels = _panels(found)
    methods = _methods(found)
    for axes, board in zip(panels, found, strict=True):
        draw_flops(axes, board, methods)
    legend_below(figure, columns=5)
    return to_png(figure)


def draw_flops(axes: Any, board: Board, methods: Sequence[str]) -> None:
    """One line per method through its sparsities: what it costs to train, and what comes of it."""
    for index, name in enumerate(methods):
        there = [
            (cell.mean("training_flops"), cell.mean(), s) for s, cell in board.cells.get(name, {}).items() if s > 0
        ]
        points = [(x, y, s) for x, y, s in there if x is not None and y is not None]
        if not points:
            continue
        axes.plot(
            [x for x, _, _ in points],
            [y for _, y, _ in points],
            label=name,
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[(index + index // len(COLOURS)) % len(MARKERS)],
            linestyle="--" if index // len(COLOURS) % 2 else "-",
            markersize=5,
            linewidth=1.4,
        )
        for x, y, s in points:
            axes.annotate(f"{100 * s:g}", (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
    dense = _dense(board)
    if dense:
        level = sum(dense) / len(dense)
        axes.plot([1.0], [level], color="black", marker="*", markersize=10, linestyle="", label="dense")
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [x for x in _TICKS if low <= x <= high]
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.set_xticks([], minor=True)
    tidy(axes, board.title, "FLOPs of training, of dense (numbers: sparsity in %)", _AXES[board.metric])
    if not higher_is_better(board.metric):
        axes.invert_yaxis()
