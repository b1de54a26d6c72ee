"""A recording of a machine: inputs, what was measured, what drives the physics, and a split without leaks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resu.experiments.spinn.signals import Array, per_sequence, scaled

__all__ = ["Prepared", "Recording"]

SPREAD = 0.1
"""Standard deviation of the network's inputs: where tanh is nearly linear, so that wear beyond what training saw is
extrapolated instead of cut off. Chosen by leaving out tools of the training part (docs/spinn.md)."""


@dataclass(frozen=True)
class Recording:
    """One quantity as measured, in physical units.

    Attributes:
        name: Says which law holds: ``"wear"`` or ``"milling"`` Archard's, ``"thermal"`` lumped heat.
        inputs: ``[rows, features]``, causal: a row looks at its own past only.
        features: Names of the columns.
        targets: ``[rows, channels]``.
        channels: Names of the columns.
        unit: Of the targets.
        time: ``[rows]``, rising within a sequence; one clock for all sequences of a group, for it tells the first part
            of its life.
        time_unit: Its unit.
        drive: ``[rows, drives]``: integrals over time, within a sequence, of what drives the physics.
        drives: What the integrands are, with units.
        sequence: ``[rows]``: rows of one sequence lie together in the order of time.
        group: ``[rows]``: what a split must not tear apart (a tool, a case); for a split in time, one block each.
        group_name: The word for it.
        lag: Rows between the two ends of a finite difference.
        parts: Groups that train, validate and test.

    Raises:
        ValueError: If shapes do not fit, rows of a sequence do not lie together, or time does not rise along them.
    """

    name: str
    inputs: Array
    features: tuple[str, ...]
    targets: Array
    channels: tuple[str, ...]
    unit: str
    time: Array
    time_unit: str
    drive: Array
    drives: tuple[str, ...]
    sequence: NDArray[np.int64]
    group: NDArray[np.int64]
    group_name: str
    lag: int
    parts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

    def __post_init__(self) -> None:
        rows = len(self.time)
        for what, names in (("inputs", self.features), ("targets", self.channels), ("drive", self.drives)):
            _check_shape(what, getattr(self, what), (rows, len(names)))
        for what in ("time", "sequence", "group"):
            _check_shape(what, getattr(self, what), (rows,))
        numbers = dict.fromkeys(self.sequence.tolist())
        for number, (time,) in zip(numbers, per_sequence(self.sequence, self.time), strict=True):
            if (np.diff(time) <= 0).any():
                raise ValueError(f"time does not rise from row to row in sequence {number}")

    def groups(self) -> list[int]:
        """All groups, rising."""
        return [int(g) for g in np.unique(self.group)]

    def rows(self, groups: Iterable[int]) -> NDArray[np.int64]:
        """Indices of the rows of some groups."""
        return np.flatnonzero(np.isin(self.group, list(groups)))

    def prepare(self, parts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None) -> Prepared:
        """Inputs scaled by the training rows, as tensors, with the three parts.

        Args:
            parts: Groups that train, validate and test; None: those of the recording.

        Raises:
            ValueError: If a group is in two parts, is unknown, or there is nothing to train or to test on; if rows that
                train or validate are not finite.
        """
        chosen = self.parts if parts is None else parts
        listed = [g for part in chosen for g in part]
        if len(set(listed)) != len(listed):
            twice = sorted({g for g in listed if listed.count(g) > 1})
            raise ValueError(f"{self.group_name} {twice} is in two parts; a {self.group_name} belongs to one")
        unknown = sorted(set(listed) - set(self.groups()))
        if unknown:
            raise ValueError(f"there is no {self.group_name} {unknown}; there are {self.groups()}")
        train, val, test = (self.rows(part) for part in chosen)
        if not len(train) or not len(test):
            raise ValueError(f"a split needs at least one {self.group_name} to train on and one to test on")
        self._check_finite(np.concatenate([train, val]))
        inputs = scaled(self.inputs, train, SPREAD)
        return Prepared(
            self,
            torch.tensor(inputs, dtype=torch.float32),
            torch.tensor(self.targets, dtype=torch.float32),
            torch.tensor(self.time),
            torch.tensor(self.drive),
            *(torch.tensor(rows) for rows in (train, val, test)),
        )

    def _check_finite(self, known: NDArray[np.int64]) -> None:
        columns = np.c_[self.inputs, self.targets, self.drive, self.time][known]
        names = (*self.features, *self.channels, *(f"drive {name!r}" for name in self.drives), "time")
        if (bad := ~np.isfinite(columns)).any():
            row, column = np.argwhere(bad)[0]
            raise ValueError(
                f"{names[column]} is {columns[row, column]} in row {known[row]} ({self.group_name} "
                f"{self.group[known[row]]}; {int(bad.any(1).sum())} rows have such values): rows that train or "
                "validate need a number in every column; leave them out or fill them in"
            )

    def without(self, groups: Iterable[int]) -> Prepared:
        """A split whose test part is these groups; all others train or, where they do anyway, validate."""
        left = tuple(groups)
        val = tuple(g for g in self.parts[1] if g not in left)
        return self.prepare((tuple(g for g in self.groups() if g not in (*left, *val)), val, left))


def _check_shape(what: str, found: NDArray[Any], wanted: tuple[int, ...]) -> None:
    if found.shape != wanted:
        raise ValueError(
            f"{what} must have the shape {list(wanted)} (rows, and a column per name), got {list(found.shape)}"
        )


@dataclass(frozen=True)
class Prepared:
    """A recording with a split, as a network takes it.

    Attributes:
        inputs: ``[rows, features]`` float32, scaled by the training rows.
        targets: ``[rows, channels]`` float32, in units.
        time: ``[rows]`` float64.
        drive: ``[rows, drives]`` float64.
        train, val, test: Indices of rows; ``val`` may be empty.
    """

    recording: Recording
    inputs: Tensor
    targets: Tensor
    time: Tensor
    drive: Tensor
    train: Tensor
    val: Tensor
    test: Tensor

    def pairs(self, rows: Tensor) -> Tensor:
        """``[pairs, 2]``: rows ``lag`` apart in one sequence, both in ``rows``; the finite differences live on them."""
        sequence, lag = torch.tensor(self.recording.sequence), self.recording.lag
        inside = torch.zeros(len(sequence), dtype=torch.bool)
        inside[rows] = True
        first = rows[rows + lag < len(sequence)]
        first = first[(sequence[first] == sequence[first + lag]) & inside[first + lag]]
        return torch.stack([first, first + lag], 1)
