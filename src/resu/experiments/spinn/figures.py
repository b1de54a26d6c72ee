"""Plots that a machinist can read: wear along a tool's life, displacement over time, what pruning removed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from resu.experiments.plots import COLOURS, draw_layers, legend_below, new_figure, tidy
from resu.experiments.spinn.recording import Prepared

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_measured", "draw_removed"]


def draw_measured(data: Prepared, predictions: Mapping[str, Tensor]) -> Figure:
    """Measured and predicted over time on held-out rows: a panel per tool or case, or per channel.

    Args:
        data: The recording.
        predictions: ``{label: [rows, channels]}`` for all rows.
    """
    return _over_channels(data, predictions) if data.recording.name == "thermal" else _over_groups(data, predictions)


def _over_groups(data: Prepared, predictions: Mapping[str, Tensor]) -> Figure:
    recording = data.recording
    groups = [int(g) for g in dict.fromkeys(recording.group[data.test.numpy()].tolist())]
    figure = new_figure(4.2 * len(groups), 3.8)
    axes: Any = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    scale, unit = (60.0, "min") if recording.time_unit == "s" else (1.0, recording.time_unit)
    for ax, group in zip(axes, groups, strict=True):
        rows = recording.rows([group])
        # Subsamples of one run stand over each other: their mean is the run's prediction.
        times = sorted(set(recording.time[rows].tolist()))
        at = [rows[recording.time[rows] == t] for t in times]
        x = [t / scale for t in times]
        ax.plot(x, [float(data.targets[r].mean()) for r in at], color="black", lw=2, marker=_dot(x), label="measured")
        for (label, predicted), colour in zip(predictions.items(), COLOURS, strict=False):
            ax.plot(x, [float(predicted[r].mean()) for r in at], color=colour, lw=1.3, marker=_dot(x), label=label)
        tidy(ax, f"{recording.group_name} {group}", f"time in cut, {unit}" if unit == "min" else unit, "")
    axes[0].set_ylabel(f"{recording.channels[0]}, {recording.unit}")
    legend_below(figure, 4)
    return figure


def _dot(x: list[float]) -> str:
    return "o" if len(x) < 30 else ""


def _over_channels(data: Prepared, predictions: Mapping[str, Tensor]) -> Figure:
    recording, rows = data.recording, data.test
    figure = new_figure(9.0, 1.9 * len(recording.channels) + 0.6)
    axes: Any = figure.subplots(len(recording.channels), 1, squeeze=False, sharex=True)[:, 0]
    hours = (data.time[rows] / 3600).tolist()
    for c, ax in enumerate(axes):
        ax.plot(hours, data.targets[rows, c].tolist(), color="black", lw=2, label="measured")
        for (label, predicted), colour in zip(predictions.items(), COLOURS, strict=False):
            ax.plot(hours, predicted[rows, c].tolist(), color=colour, lw=1.2, label=label)
        tidy(ax, recording.channels[c], "hours since the start" if c == len(axes) - 1 else "", recording.unit)
    legend_below(figure, 4)
    return figure


def draw_removed(networks: Mapping[str, nn.Sequential], dense: nn.Sequential) -> Figure:
    """How much of each layer each way removed, of the dense network's weights."""
    full = [m.weight.numel() for m in dense if isinstance(m, nn.Linear)]
    names = [f"layer {i + 1}" for i in range(len(full))]
    removed = {
        label: {
            name: 1 - int((m.weight != 0).sum()) / count
            for name, m, count in zip(names, (m for m in network if isinstance(m, nn.Linear)), full, strict=True)
        }
        for label, network in networks.items()
    }
    figure = new_figure(7.0, 4.2)
    draw_layers(figure.subplots(), removed, "What pruning removed")
    legend_below(figure, 4)
    return figure
