"""A budget from a sensitivity scan: the layers that suffer least give most."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from resu.core.counting import check_sparsity, keep_count, pruned_count
from resu.core.io import replacing
from resu.pruning.compression import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Point", "Sensitivity", "allocate_by_sensitivity"]


class Point(NamedTuple):
    """One measurement: a layer pruned alone to ``sparsity`` keeps ``keep`` of ``numel`` weights and gives ``loss``."""

    sparsity: float
    keep: int
    numel: int
    loss: float


@dataclass(frozen=True)
class Sensitivity:
    """The result of a scan; ``print`` it for a table of losses above the baseline.

    Attributes:
        baseline: Loss of the unpruned model.
        points: ``{parameter name: measurements}``, in rising sparsity.
        settings: What was scanned, as plain JSON.
    """

    baseline: float
    points: Mapping[str, tuple[Point, ...]]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def losses(self) -> dict[str, dict[float, float]]:
        """``{parameter name: {sparsity: loss}}``."""
        return {name: {p.sparsity: p.loss for p in row} for name, row in self.points.items()}

    def increase(self, name: str, keep: int) -> float:
        """Predicted growth of the loss if a layer keeps ``keep`` weights: the envelope of what was measured.

        Raises:
            ValueError: On an unknown layer, or a count below what was scanned.
        """
        if name not in self.points:
            raise ValueError(f"{name!r} was not scanned; scanned: {', '.join(self.points)}")
        hull = _envelope(self.points[name], self.baseline)
        pruned = self.points[name][0].numel - keep
        for (x0, y0), (x1, y1) in itertools.pairwise(hull):
            if x0 <= pruned <= x1:
                return y0 + (y1 - y0) * (pruned - x0) / (x1 - x0)
        if pruned == 0:
            return 0.0
        raise ValueError(f"{name!r} was scanned down to {self.points[name][0].numel - hull[-1][0]} kept, not to {keep}")

    def allocation(
        self, shapes: Mapping[str, torch.Size], sparsity: float, scores: Mapping[str, Tensor] | None = None
    ) -> dict[str, int]:
        """A distribution: pass ``distribution=scan.allocation`` wherever one is taken.

        Args:
            shapes: Of scanned layers, all or some.
            sparsity: Of all their weights together.
            scores: Not used.

        Returns:
            ``{name: keep}``; the total is exact.

        Raises:
            ValueError: If a layer was not scanned or has another size, or the sparsity is beyond the scan.
        """
        for name, shape in shapes.items():
            if name not in self.points:
                raise ValueError(f"{name!r} was not scanned; scanned: {', '.join(self.points)}")
            if self.points[name][0].numel != math.prod(shape):
                raise ValueError(
                    f"{name!r} has {math.prod(shape)} weights, the scanned one {self.points[name][0].numel}; "
                    "scan this model"
                )
        return _allocated({name: self.points[name] for name in shapes}, self.baseline, sparsity)

    def sparsities(self, sparsity: float) -> dict[str, float]:
        """The same budget as ``{parameter name: sparsity}``; each gives exactly the count of :meth:`allocation`."""
        keeps = allocate_by_sensitivity(self, sparsity)
        return {name: _decimal(self.points[name][0].numel, keep) for name, keep in keeps.items()}

    def plot(self, save_path: str | os.PathLike[str] | None = None) -> Figure:
        """Loss above the baseline against the sparsity of each layer, as a matplotlib figure.

        Args:
            save_path: Where to write it (format by ending; replaces an older plot); None: nowhere.

        Raises:
            ImportError: Without matplotlib; it names the extra to install.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "plots need matplotlib, which is not installed: pip install 'resu-torch[plots]'"
            ) from error
        figure = Figure(figsize=(7.5, 4.5), layout="constrained")  # not pyplot: no window, no global state
        axes = figure.subplots()
        styles = ("-", "--", ":", "-.")
        for index, (name, row) in enumerate(self.points.items()):
            finite = [p for p in row if math.isfinite(p.loss)]
            axes.plot(
                [0.0, *(100 * p.sparsity for p in finite)],
                [0.0, *(p.loss - self.baseline for p in finite)],
                linestyle=styles[index // 10 % 4],
                marker=".",
                label=name,
            )
        axes.set(xlabel="sparsity of this layer alone (%)", ylabel="loss above that of the unpruned model")
        axes.set_yscale("symlog", linthresh=1e-2)
        axes.grid(color="#DDDDDD", linewidth=0.6)
        if len(self.points) <= 40:  # more names than that cover the plot
            figure.legend(fontsize=6, ncols=2 if len(self.points) > 20 else 1, loc="outside right upper")
        if save_path is not None:
            with replacing(save_path, overwrite=True) as temporary:
                figure.savefig(temporary, format=os.path.splitext(save_path)[1].removeprefix(".") or "png")
        return figure

    def __str__(self) -> str:
        levels = sorted({p.sparsity for row in self.points.values() for p in row})
        rows = []
        for name, row in self.points.items():
            at = {p.sparsity: p.loss - self.baseline for p in row}
            rows.append([name, f"{row[0].numel}", *(f"{at[s]:+.4f}" if s in at else "" for s in levels)])
        return "\n".join(
            [
                f"loss of the unpruned model: {self.baseline:.4f}; above it, with one layer pruned:",
                *table(["layer", "weights", *(f"{s:g}" for s in levels)], rows),
            ]
        )


def allocate_by_sensitivity(scan: Sensitivity, sparsity: float) -> dict[str, int]:
    """The budget that minimizes the sum of predicted losses, exact in total.

    Per layer the measured losses are made monotone (noise must not reward pruning) and replaced by their lower convex
    envelope over the count of pruned weights; then segments are taken in the order of their slope until the budget is
    met, the last one in part. For convex curves this greedy choice is optimal (the Lagrangian has one multiplier). What
    it does not know is how layers interact: losses of single layers are added up.

    Args:
        scan: From :func:`resu.pruning.sensitivity.sensitivity_scan`.
        sparsity: Of all scanned weights together.

    Returns:
        ``{parameter name: keep}``, adding up to ``n - floor(n · sparsity)``.

    Raises:
        ValueError: If the sparsity is beyond what was scanned.

    Example:
        >>> flat = (Point(0.5, 50, 100, 0.1), Point(0.75, 25, 100, 0.2))
        >>> steep = (Point(0.5, 50, 100, 1.0), Point(0.75, 25, 100, 9.0))
        >>> allocate_by_sensitivity(Sensitivity(0.0, {"a": flat, "b": steep}, {}), 0.5)
        {'a': 25, 'b': 75}
    """
    return _allocated(scan.points, scan.baseline, sparsity)


def _envelope(row: tuple[Point, ...], baseline: float) -> list[tuple[int, float]]:
    """Corners ``(pruned, loss above baseline)`` of the lower convex envelope of the running maximum."""
    corners, highest = [(0, 0.0)], 0.0
    for point in sorted(row, key=lambda p: -p.keep):
        highest = max(highest, point.loss - baseline)
        x = point.numel - point.keep
        if not math.isfinite(highest) or x <= corners[-1][0]:
            continue
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(corners[-1], (x, highest)):
            corners.pop()
        corners.append((x, highest))
    return corners


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _allocated(points: Mapping[str, tuple[Point, ...]], baseline: float, sparsity: float) -> dict[str, int]:
    check_sparsity(sparsity)
    sizes = {name: row[0].numel for name, row in points.items()}
    total = sum(sizes.values())
    left = total - keep_count(total, sparsity)
    segments: list[tuple[float, int, str, int]] = []
    for index, (name, row) in enumerate(points.items()):
        hull = _envelope(row, baseline)
        segments += [(_slope(a, b), index, name, b[0] - a[0]) for a, b in itertools.pairwise(hull)]
    reach = sum(length for *_, length in segments)
    if reach < left:
        raise ValueError(
            f"the scan reaches a sparsity of {reach / total:.4f} over all layers, not {sparsity!r}; "
            "scan to higher sparsities"
        )
    pruned = dict.fromkeys(sizes, 0)
    for _, _, name, length in sorted(segments, key=lambda s: s[:2]):  # of equals the earlier layer
        taken = min(length, left)
        pruned[name] += taken
        left -= taken
    return {name: size - pruned[name] for name, size in sizes.items()}


def _decimal(n: int, keep: int) -> float:
    """A sparsity of up to 12 decimals whose count is ``keep`` exactly."""
    value = math.ceil((n - keep) * 10**12 / n) / 10**12
    return value if pruned_count(n, value) == n - keep else math.nextafter((n - keep) / n, 1.0)
