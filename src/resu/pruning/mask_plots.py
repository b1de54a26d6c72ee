"""Plots of masks; matplotlib is loaded when one is drawn."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from resu.core.io import replacing
from resu.core.mask import SparseMask
from resu.pruning.mask_stats import compute_sparsity_stats, diff_masks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_mask_diff", "plot_sparsity_by_layer", "plot_sparsity_histogram"]

_MOST_NAMES = 60  # beyond, names would overlap whatever the size of the figure


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib, which is not installed: pip install 'resu-torch[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")  # not pyplot: no window, no global state


def _saved(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    if path is not None:
        with replacing(path, overwrite=True) as temporary:
            figure.savefig(temporary, format=os.path.splitext(path)[1].removeprefix(".") or "png")
    return figure


def _over_depth(names: Sequence[str]) -> tuple[Figure, Any]:
    """A figure with one place per layer on the horizontal axis, in the order of the masks."""
    figure = _figure(min(24.0, max(6.0, 0.3 * len(names) + 2)), 4.5)
    axes = figure.subplots()
    if len(names) <= _MOST_NAMES:
        # Names are text: a "$" in one starts no formula.
        axes.set_xticks(range(len(names)), [name.replace("$", r"\$") for name in names], rotation=90, fontsize=7)
    else:
        axes.set_xlabel("layer, from the input on")
    axes.set_xlim(-0.6, max(len(names), 1) - 0.4)
    return figure, axes


def plot_sparsity_histogram(
    masks: Mapping[str, Tensor | SparseMask], save_path: str | os.PathLike[str] | None = None
) -> Figure:
    """How many layers have which sparsity, as a matplotlib figure.

    Args:
        masks: ``{name: mask}``.
        save_path: Where to write it (format by ending; replaces an older plot); None: nowhere.

    Raises:
        ImportError: Without matplotlib; it names the extra to install.

    Example:
        >>> import torch
        >>> figure = plot_sparsity_histogram({"w": torch.tensor([True, False])})
        >>> figure.axes[0].get_xlabel()
        'sparsity of the layer (%)'
    """
    figure = _figure(6, 4)
    stats = compute_sparsity_stats(masks)
    axes = figure.subplots()
    each = [100 * layer["sparsity"] for layer in stats["per_layer"].values()]
    axes.hist(each, bins=20, range=(0, 100), color="tab:blue", edgecolor="white")
    overall = 100 * stats["global"]["sparsity"]
    axes.axvline(overall, color="tab:red", label=f"all weights: {overall:.1f} %")
    axes.set(xlabel="sparsity of the layer (%)", ylabel="layers", title="Sparsity by layer")
    axes.legend()
    return _saved(figure, save_path)


def plot_sparsity_by_layer(
    masks: Mapping[str, Tensor | SparseMask], save_path: str | os.PathLike[str] | None = None
) -> Figure:
    """The sparsity of each layer as a bar, in the order of the masks, with that of all weights as a line.

    Args:
        masks: ``{name: mask}``, from the model's input to its output.
        save_path: Where to write it (format by ending; replaces an older plot); None: nowhere.

    Returns:
        A matplotlib figure; layers are named up to 60 of them.

    Raises:
        ImportError: Without matplotlib; it names the extra to install.
    """
    stats = compute_sparsity_stats(masks)
    layers = stats["per_layer"]
    figure, axes = _over_depth(list(layers))
    axes.bar(range(len(layers)), [100 * layer["sparsity"] for layer in layers.values()], color="tab:blue")
    overall = 100 * stats["global"]["sparsity"]
    axes.axhline(overall, color="tab:red", label=f"all weights: {overall:.1f} %")
    axes.set(ylabel="sparsity (%)", ylim=(0, 100), title="Sparsity over depth")
    axes.legend()
    return _saved(figure, save_path)


def plot_mask_diff(
    a: Mapping[str, Tensor | SparseMask],
    b: Mapping[str, Tensor | SparseMask],
    save_path: str | os.PathLike[str] | None = None,
) -> Figure:
    """How much of each layer's kept weights changed from masks ``a`` to ``b``: born and dead, and the churn of all.

    Bars are fractions of ``kept_before + kept_after``, so that born and dead, stacked, are the layer's churn as
    :func:`~resu.pruning.mask_stats.diff_masks` defines it.

    Args:
        a: ``{name: mask}`` before.
        b: The same names and shapes after.
        save_path: Where to write it (format by ending; replaces an older plot); None: nowhere.

    Raises:
        ImportError: Without matplotlib; it names the extra to install.
        ValueError: If names or shapes differ.
    """
    diff = diff_masks(a, b)
    layers = diff["per_layer"]
    figure, axes = _over_depth(list(layers))
    places = range(len(layers))
    kept = [max(layer["kept_before"] + layer["kept_after"], 1) for layer in layers.values()]
    born = [100 * layer["born"] / n for layer, n in zip(layers.values(), kept, strict=True)]
    dead = [100 * layer["dead"] / n for layer, n in zip(layers.values(), kept, strict=True)]
    axes.bar(places, born, color="tab:green", label="born")
    axes.bar(places, dead, bottom=born, color="tab:gray", label="dead")
    overall = 100 * diff["global"]["churn"]
    axes.axhline(overall, color="tab:red", label=f"all weights: {overall:.1f} %")
    axes.set(ylabel="churn (%)", title="Change of masks over depth")
    axes.legend()
    return _saved(figure, save_path)
