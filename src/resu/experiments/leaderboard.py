"""Rows to CSV and back, and what a reader sees: a table with mean and spread, and a plot."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from resu.experiments.plots import draw_accuracy, legend_below, new_figure, to_png
from resu.experiments.recipes import Row
from resu.experiments.rows import append, read

__all__ = ["Cell", "Table", "append_row", "markdown", "plot", "read_rows", "tables"]


def append_row(path: str | Path, row: Row) -> None:
    """Add one row; see :func:`resu.experiments.rows.append`.

    Raises:
        ValueError: If the file has other columns.
    """
    append(path, row)


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a CSV in order; see :func:`resu.experiments.rows.read`.

    Raises:
        ValueError: If the file has other columns.
    """
    return read(path, Row)


@dataclass(frozen=True)
class Cell:
    """Results of one method at one sparsity over seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """Sample standard deviation over seeds; 0 for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


@dataclass(frozen=True)
class Table:
    """All comparable results of one task in one regime.

    Attributes:
        cells: By method, then sparsity.
        settings: What each method did.
        exact: Whether every sparse run had exact counts and exact zeros.
    """

    task: str
    regime: str
    metric: str
    steps: int
    recipe: str
    cells: Mapping[str, Mapping[float, Cell]]
    settings: Mapping[str, str]
    seconds: Mapping[str, float]
    held: Mapping[str, float]
    exact: bool

    @property
    def sparsities(self) -> list[float]:
        """In order, without the dense one."""
        return sorted({s for row in self.cells.values() for s in row} - {0.0})

    def best(self, sparsity: float) -> str:
        """The method with the best mean at a sparsity."""
        there = {m: row[sparsity].mean for m, row in self.cells.items() if sparsity in row}
        return (max if self.metric == "accuracy" else min)(there, key=lambda m: there[m])


def tables(rows: Iterable[Row]) -> list[Table]:
    """Rows gathered per task and regime.

    Rows of an older recipe (other steps, batch size or learning rate) are left out, and so are those of older
    settings of a method: only what ran alike is compared.
    """
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.task, row.regime].append(row)
    return [_table(group) for group in groups.values()]


def _table(rows: list[Row]) -> Table:
    last = rows[-1]
    rows = [r for r in rows if (r.recipe, r.steps) == (last.recipe, last.steps)]
    settings = {row.method: row.settings for row in rows}
    rows = [row for row in rows if row.settings == settings[row.method]]
    found = {(row.method, row.sparsity, row.seed): row for row in rows}
    cells: dict[str, dict[float, Cell]] = defaultdict(dict)
    for method, sparsity, _ in found:
        same = [row for key, row in found.items() if key[:2] == (method, sparsity)]
        cells[method][sparsity] = Cell(tuple(row.test for row in same))

    def mean(method: str, field: str) -> float:
        return statistics.fmean(float(getattr(row, field)) for key, row in found.items() if key[0] == method)

    return Table(
        task=last.task,
        regime=last.regime,
        metric=last.metric,
        steps=last.steps,
        recipe=last.recipe,
        cells=dict(cells),
        settings=settings,
        seconds={method: mean(method, "seconds") for method in cells},
        held={method: mean(method, "held_bytes") for method in cells},
        exact=all(row.zeros_exact for row in found.values()),
    )


def markdown(table: Table, order: Sequence[str] = ()) -> str:
    """One table: methods down, sparsities across, mean ± standard deviation over seeds, the best in bold."""
    digits = 1 if table.metric == "accuracy" else 3
    names = [m for m in order if m in table.cells] + sorted(set(table.cells) - set(order))
    head = ["method", *(f"{s:g}" for s in table.sparsities), "seeds"]
    lines = [head, ["---"] * len(head)]
    for name in names:
        row = table.cells[name]
        cells = []
        for s in table.sparsities:
            cell = row.get(0.0 if name == "dense" else s)
            if cell is None:
                cells.append("–")
                continue
            text = f"{cell.mean:.{digits + 1}f} ± {cell.std:.{digits + 1}f}"
            cells.append(f"**{text}**" if name == table.best(s) else text)
        counts = {len(cell.values) for cell in row.values()}
        lines.append([name, *cells, "–".join(map(str, sorted({min(counts), max(counts)})))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(found: Sequence[Table], path: str | Path, methods: Sequence[str]) -> None:
    """The metric against sparsity, one panel per table: means over seeds, from the lowest to the highest.

    Each of ``methods`` has the same colour in every panel; the others are in the tables only.
    """
    columns = min(2, len(found))
    height = -(-len(found) // columns)
    figure = new_figure(6.4 * columns, 4.6 * height + 0.6)
    there = [m for m in methods if any(m in table.cells for table in found)]
    for i, table in enumerate(found):
        dense = table.cells.get("dense", {}).get(0.0)
        draw_accuracy(
            figure.add_subplot(height, columns, i + 1),
            {m: {s: cell.values for s, cell in table.cells.get(m, {}).items()} for m in there},
            dense.values if dense is not None else (),
            title=f"{table.task}, {table.regime}, {table.steps} steps",
            y="test accuracy (%)" if table.metric == "accuracy" else "test loss (nats), lower is better",
        )
    legend_below(figure, columns=5)
    scratch = Path(path).with_suffix(".part.png")
    scratch.write_bytes(to_png(figure, dpi=100))
    os.replace(scratch, path)
