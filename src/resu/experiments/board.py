"""The leaderboard: results of training runs gathered into tables of what may be compared."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from resu.experiments import rows
from resu.experiments.train import ConfigError, Result, read_result
from resu.experiments.train.evaluation import higher_is_better
from resu.experiments.train.folder import CONFIG, RESULT

__all__ = ["Board", "Cell", "Line", "boards", "collect", "lines", "unfinished"]


def collect(paths: Iterable[str | Path]) -> list[Result]:
    """Results from folders (every ``result.json`` in them, at any depth) and CSV files of rows, in order.

    Raises:
        ConfigError: If a path is neither, a file is not what it should be, or there is no result.
    """
    found: list[Result] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += [read_result(file) for file in sorted(path.rglob(RESULT))]
        elif path.suffix == ".csv" and path.is_file():
            found += rows.read(path, Result)
        else:
            raise ConfigError(f"{path} is neither a folder of runs nor a .csv file of their rows")
    if not found:
        raise ConfigError(f"no {RESULT} in {', '.join(map(str, paths))}: runs write it at their end")
    return found


def unfinished(paths: Iterable[str | Path]) -> int:
    """How many runs in the folders have begun and have no result."""
    begun = [file.parent for path in map(Path, paths) if path.is_dir() for file in path.rglob(CONFIG)]
    return sum(not (folder / RESULT).exists() for folder in begun)


@dataclass(frozen=True)
class Cell:
    """What one method reached at one sparsity: its runs, one per seed."""

    runs: tuple[Result, ...]

    @property
    def values(self) -> tuple[float, ...]:
        """The metric on the test part, one per seed."""
        return tuple(run.test for run in self.runs)

    @property
    def std(self) -> float:
        """Sample standard deviation over seeds; 0 for a single one."""
        return statistics.stdev(self.values) if len(self.runs) > 1 else 0.0

    def mean(self, field: str = "test") -> float | None:
        """Mean of a figure over seeds; None where a run does not have it."""
        values = [getattr(run, field) for run in self.runs]
        return None if any(value is None for value in values) else statistics.fmean(values)


@dataclass(frozen=True)
class Board:
    """Runs that may be compared: the same data, model, steps, regime and recipe.

    Attributes:
        cells: By what a method is called, then by sparsity.
    """

    data: str
    model: str
    regime: str
    steps: int
    metric: str
    recipe: str
    cells: Mapping[str, Mapping[float, Cell]]

    @property
    def title(self) -> str:
        """What was run, in a few words."""
        return f"{self.model} on {self.data}, {'from scratch' if self.regime == 'scratch' else 'fine-tuned'}, " + (
            f"{self.steps} steps"
        )

    @property
    def sparsities(self) -> list[float]:
        """In order, without that of dense runs."""
        return sorted({s for row in self.cells.values() for s in row} - {0.0})

    def best(self, sparsity: float) -> str:
        """The method with the best mean at a sparsity."""
        there = {name: row[sparsity].mean() or 0.0 for name, row in self.cells.items() if sparsity in row}
        return (max if higher_is_better(self.metric) else min)(there, key=lambda name: there[name])


def boards(results: Sequence[Result]) -> list[Board]:
    """Results gathered by what may be compared; of two runs that differ in nothing but figures, the later counts."""
    groups: dict[tuple[str, ...], list[Result]] = defaultdict(list)
    for result in results:
        same = (result.data, result.model, result.regime, str(result.steps), result.metric, result.recipe)
        groups[same].append(result)
    return [_board(group) for group in groups.values()]


def _board(results: Sequence[Result]) -> Board:
    last = results[-1]
    names = _names(results)
    found = {(names[r.method, r.settings], r.sparsity, r.seed): r for r in results}
    cells: dict[str, dict[float, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for (name, sparsity, _), result in sorted(found.items(), key=lambda item: item[0][2]):
        cells[name][sparsity].append(result)
    return Board(
        *(last.data, last.model, last.regime, last.steps, last.metric, last.recipe),
        cells={name: {s: Cell(tuple(runs)) for s, runs in sorted(row.items())} for name, row in sorted(cells.items())},
    )


def _names(results: Sequence[Result]) -> dict[tuple[str, str], str]:
    """What to call a method with some settings: its name, and what is its own where the name has several at once."""
    at: dict[tuple[str, float], set[str]] = defaultdict(set)
    of: dict[str, set[str]] = defaultdict(set)
    for result in results:
        at[result.method, result.sparsity].add(result.settings)
        of[result.method].add(result.settings)
    split = {method for (method, _), settings in at.items() if len(settings) > 1}
    names = {}
    for method, settings in of.items():
        common = set.intersection(*(set(text.split()) for text in settings))
        for text in settings:
            own = " ".join(word for word in text.split() if word not in common)
            names[method, text] = f"{method} ({own or 'plain'})" if method in split else method
    return names


@dataclass(frozen=True)
class Line:
    """One line of the leaderboard, as in ``leaderboard.csv``: a method at a sparsity, over seeds."""

    data: str
    model: str
    regime: str
    steps: int
    method: str
    sparsity: float
    metric: str
    mean: float
    std: float
    seeds: int
    val: float
    actual_sparsity: float
    exact: bool
    explored: float
    training_flops: float | None
    inference_flops: float | None
    seconds: float
    best: bool
    settings: str
    recipe: str


def lines(board: Board) -> list[Line]:
    """A board as lines: by sparsity, and there the best first."""
    found = [_line(board, name, s, cell) for name, row in board.cells.items() for s, cell in row.items()]
    sign = -1 if higher_is_better(board.metric) else 1
    return sorted(found, key=lambda line: (line.sparsity, sign * line.mean, line.method))


def _line(board: Board, name: str, sparsity: float, cell: Cell) -> Line:
    given = {field.name: getattr(cell.runs[-1], field.name) for field in fields(Result)}
    means = {
        key: None if (mean := cell.mean(key)) is None else round(mean, 6)
        for key in ("val", "actual_sparsity", "explored", "training_flops", "inference_flops", "seconds")
    }
    own = {
        "method": name,
        "mean": round(cell.mean() or 0.0, 6),
        "std": round(cell.std, 6),
        "seeds": len(cell.runs),
        "exact": all(run.exact for run in cell.runs),
        "best": sparsity > 0 and board.best(sparsity) == name,
    }
    values = {**given, **means, **own}
    return Line(**{field.name: values[field.name] for field in fields(Line)})
