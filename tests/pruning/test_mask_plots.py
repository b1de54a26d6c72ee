"""Plots say what the masks say."""

import sys

import pytest
import torch

from resu.pruning.mask_ops import diff_masks, plot_mask_diff, plot_sparsity_by_layer, plot_sparsity_histogram


def some_masks(seed=0, n=4):
    generator = torch.Generator().manual_seed(seed)
    return {f"layers.{i}.$w_1$": torch.rand(5, 11, generator=generator) < 0.4 for i in range(n)}


def test_the_histogram_counts_layers(tmp_path):
    pytest.importorskip("matplotlib")
    figure = plot_sparsity_histogram(some_masks(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert sum(bar.get_height() for bar in figure.axes[0].patches) == 4
    plot_sparsity_histogram(some_masks(), tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_bars_over_depth_are_the_layers_sparsities(tmp_path):
    pytest.importorskip("matplotlib")
    masks = some_masks()
    axes = plot_sparsity_by_layer(masks, tmp_path / "plot.png").axes[0]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    expected = [100 * (1 - mask.float().mean().item()) for mask in masks.values()]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(expected, abs=1e-4)
    assert [text.get_text() for text in axes.get_xticklabels()] == [name.replace("$", r"\$") for name in masks]
    many = some_masks(n=61)
    assert len(plot_sparsity_by_layer(many, tmp_path / "many.png").axes[0].patches) == 61


def test_born_and_dead_are_stacked_to_the_churn(tmp_path):
    pytest.importorskip("matplotlib")
    a, b = some_masks(0), some_masks(1)
    axes = plot_mask_diff(a, b, tmp_path / "plot.png").axes[0]
    tops = [bar.get_y() + bar.get_height() for bar in axes.patches[4:]]
    assert tops == pytest.approx([100 * each["churn"] for each in diff_masks(a, b)["per_layer"].values()])
    with pytest.raises(ValueError, match="name different weights"):
        plot_mask_diff(a, {})
    empty = {"w": torch.zeros(2, 2, dtype=torch.bool)}
    assert plot_mask_diff(empty, empty).axes[0].patches[0].get_height() == 0


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    masks = some_masks()
    for call in (plot_sparsity_histogram, plot_sparsity_by_layer, lambda m: plot_mask_diff(m, m)):
        with pytest.raises(ImportError, match=r"pip install 'resu-torch\[plots\]'"):
            call(masks)
