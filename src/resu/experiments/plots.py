"""Plots of accuracy, sparsity, memory and training, drawn on axes that the caller owns.

No global plot state is touched: figures are plain objects and are drawn without a display. Colours are
those of Okabe and Ito, which stay apart for colour-blind readers; markers and labels say the same again.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Phase",
    "Trace",
    "draw_accuracy",
    "draw_layers",
    "draw_memory",
    "draw_training",
    "legend_below",
    "new_figure",
    "tidy",
    "to_png",
]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
PHASE_COLOURS = {
    "train": "#FFFFFF",
    "stabilize": "#E69F00",
    "resurrection: θ trains": "#009E73",
    "ramp": "#999999",
    "tournaments": "#CC79A7",
    "fixed mask": "#56B4E9",
}


@dataclass(frozen=True)
class Phase:
    """A stretch of training, in steps: ``[start, end)``."""

    name: str
    start: int
    end: int


@dataclass
class Trace:
    """What happened over the steps of one run."""

    loss: list[float] = field(default_factory=list)
    sparsity: list[tuple[int, float]] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)


def new_figure(width: float = 7.0, height: float = 4.4) -> Figure:
    """An empty figure with the project's look; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def to_png(figure: Figure, dpi: int = 130) -> bytes:
    """The figure as PNG bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def tidy(ax: Any, title: str, x: str, y: str) -> None:
    """Title, names of the axes, a light grid."""
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold")
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.grid(axis="both", color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def draw_accuracy(
    ax: Any,
    curves: Mapping[str, Mapping[float, Sequence[float]]],
    dense: Sequence[float] = (),
    title: str = "Accuracy against sparsity",
    y: str = "test accuracy (%)",
) -> None:
    """One line per method: mean over seeds, bars from the lowest to the highest seed.

    Args:
        ax: Axes to draw on.
        curves: ``{method: {sparsity: [accuracy in percent, one per seed]}}``.
        dense: Accuracies of the dense network, drawn as a level.
        title: Title of the plot.
        y: What the accuracy axis says.
    """
    levels = sorted({sparsity for curve in curves.values() for sparsity in curve})
    for index, (name, curve) in enumerate(curves.items()):
        # Neighbouring methods stand a little apart, so that their bars stay readable.
        shift = (index - (len(curves) - 1) / 2) * min(0.07, 0.8 / len(curves))
        xs = [levels.index(s) + shift for s in sorted(curve)]
        means = [_mean(curve[s]) for s in sorted(curve)]
        low = [m - min(curve[s]) for m, s in zip(means, sorted(curve), strict=True)]
        high = [max(curve[s]) - m for m, s in zip(means, sorted(curve), strict=True)]
        ax.errorbar(
            xs,
            means,
            yerr=[low, high],
            label=name,
            color=COLOURS[index % len(COLOURS)],
            # Where colours come again, markers do not come with them, and lines are dashed.
            linestyle="--" if index // len(COLOURS) % 2 else "-",
            marker=MARKERS[(index + index // len(COLOURS)) % len(MARKERS)],
            markersize=5,
            linewidth=1.6,
            elinewidth=1,
            capsize=2.5,
        )
    if dense:
        ax.axhline(_mean(dense), color="black", linestyle="--", linewidth=1.2, label="dense")
    ax.set_xticks(range(len(levels)), [f"{100 * s:g} %" for s in levels])
    tidy(ax, title, "sparsity (weights removed)", y)


def draw_layers(ax: Any, methods: Mapping[str, Mapping[str, float]], title: str = "Sparsity of each layer") -> None:
    """Bars of the sparsity of each layer, grouped by layer, one colour per method."""
    layers = list(dict.fromkeys(layer for rows in methods.values() for layer in rows))
    height = 0.8 / max(1, len(methods))
    for index, (name, rows) in enumerate(methods.items()):
        ys = [i + (index - (len(methods) - 1) / 2) * height for i in range(len(layers))]
        values = [100 * rows.get(layer, 0.0) for layer in layers]
        bars = ax.barh(ys, values, height * 0.92, label=name, color=COLOURS[index % len(COLOURS)])
        ax.bar_label(bars, fmt="%.0f", fontsize=7, padding=2)
    ax.set_yticks(range(len(layers)), layers)
    ax.invert_yaxis()
    ax.set_xlim(0, 108)
    tidy(ax, title, "sparsity (% of the layer's weights removed)", "")
    ax.grid(axis="y", visible=False)


def draw_memory(ax: Any, bars: Mapping[str, Mapping[str, int]], title: str = "Bytes held while training") -> None:
    """Stacked bars: one per moment of training, one colour per kind of bytes.

    Args:
        ax: Axes to draw on.
        bars: ``{label: {kind: bytes}}``.
        title: Title of the plot.
    """
    kinds = [
        kind
        for kind in dict.fromkeys(kind for row in bars.values() for kind in row)
        if any(row.get(kind) for row in bars.values())
    ]
    largest = max((sum(row.values()) for row in bars.values()), default=0)
    unit, scale = ("MB", 1e6) if largest >= 1e6 else ("kB", 1e3)
    left = dict.fromkeys(bars, 0.0)
    for index, kind in enumerate(kinds):
        values = [row.get(kind, 0) / scale for row in bars.values()]
        ax.barh(
            list(bars),
            values,
            0.7,
            left=list(left.values()),
            label=kind,
            color=COLOURS[index % len(COLOURS)],
            edgecolor="white",
            linewidth=0.5,
        )
        for name, value in zip(bars, values, strict=True):
            left[name] += value
    for position, total in enumerate(left.values()):
        ax.text(total, position, f" {total:.3g}", va="center", fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(0, max(left.values(), default=1) * 1.12)
    tidy(ax, title, f"bytes held ({unit})", "")
    ax.grid(axis="y", visible=False)


def draw_training(ax: Any, trace: Trace, title: str = "Training") -> None:
    """Loss over the steps (smoothed), sparsity as steps beside it, phases shaded behind both."""
    named: set[str] = set()
    for phase in trace.phases:
        if phase.end <= phase.start:
            continue
        colour = PHASE_COLOURS.get(phase.name, "#CCCCCC")
        label = None if phase.name in named or colour == "#FFFFFF" else phase.name
        named.add(phase.name)
        ax.axvspan(phase.start, phase.end, color=colour, alpha=0.22, linewidth=0, label=label)
    window = max(1, len(trace.loss) // 60)
    smooth = [_mean(trace.loss[max(0, i - window + 1) : i + 1]) for i in range(len(trace.loss))]
    ax.plot(range(len(smooth)), smooth, color=COLOURS[0], linewidth=1.3, label="training loss (left)")
    ax.set_yscale("log")
    tidy(ax, title, "training step", f"loss (mean of {window} steps)" if window > 1 else "loss")
    if trace.sparsity:
        beside = ax.twinx()
        xs = [step for step, _ in trace.sparsity] + [len(trace.loss)]
        ys = [100 * s for _, s in trace.sparsity] + [100 * trace.sparsity[-1][1]]
        beside.step(xs, ys, where="post", color=COLOURS[1], linewidth=1.5, label="sparsity (right)")
        beside.set_ylim(0, 105)
        beside.set_ylabel("sparsity (%)")
        beside.spines["top"].set_visible(False)
    ax.set_xlim(0, max(1, len(trace.loss)))


def legend_below(figure: Figure, columns: int = 3) -> None:
    """One legend for all axes of a figure, under them; what is named twice is shown once."""
    found: dict[str, Any] = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(
        list(found.values()), list(found), fontsize=8, frameon=False, loc="outside lower center", ncols=columns
    )
