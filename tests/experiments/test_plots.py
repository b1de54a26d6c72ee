"""Plots are drawn without a display, without warnings, and without touching matplotlib's global state."""

import sys

import pytest

pytest.importorskip("matplotlib")
from resu.experiments import plots
from resu.experiments.plots import Phase, Trace

TRACE = Trace(
    loss=[2.0 / (1 + i) + 0.1 for i in range(90)],
    sparsity=[(0, 0.0), (30, 0.4), (60, 0.8)],
    phases=[Phase("train", 0, 30), Phase("resurrection: θ trains", 30, 60), Phase("fixed mask", 60, 90)],
)


def picture(draw, *args):
    figure = plots.new_figure()
    ax = figure.subplots()
    draw(ax, *args)
    plots.legend_below(figure)
    data = plots.to_png(figure)
    assert data.startswith(b"\x89PNG")
    assert len(data) > 5000
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    return ax


def test_accuracy_has_a_line_per_method_and_the_sparsities_as_ticks():
    curves = {"a": {0.5: [97.0, 96.0], 0.9: [90.0]}, "b": {0.9: [91.0, 92.0]}}
    ax = picture(plots.draw_accuracy, curves, [97.5])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["50 %", "90 %"]
    assert {text.get_text() for text in ax.figure.legends[0].get_texts()} == {"a", "b", "dense"}
    assert ax.get_ylabel() == "test accuracy (%)"


def test_layers_have_a_bar_each():
    ax = picture(plots.draw_layers, {"a": {"x": 0.5, "y": 0.9}, "b": {"x": 0.4}})
    assert [patch.get_width() for patch in ax.patches] == pytest.approx([50, 90, 40, 0])


@pytest.mark.parametrize(("factor", "unit"), [(1, "kB"), (1000, "MB")])
def test_memory_bars_add_up(factor, unit):
    rows = {"dense": {"weights": 2000 * factor, "θ": 0}, "RESU": {"weights": 500 * factor, "θ": 1500 * factor}}
    ax = picture(plots.draw_memory, rows)
    assert unit in ax.get_xlabel()
    assert sum(patch.get_width() for patch in ax.patches) == pytest.approx(4.0)


def test_training_shades_its_phases():
    ax = picture(plots.draw_training, TRACE)
    _, labels = ax.get_legend_handles_labels()
    assert labels == ["resurrection: θ trains", "fixed mask", "training loss (left)"]


def test_an_empty_trace_is_drawn():
    picture(plots.draw_training, Trace())


def test_a_legend_names_each_thing_once():
    figure = plots.new_figure()
    for ax in figure.subplots(2, 1):
        plots.draw_training(ax, TRACE)
    plots.legend_below(figure)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(names) == len(set(names)) == 4
