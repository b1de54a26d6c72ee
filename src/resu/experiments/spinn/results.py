"""Measured numbers: a kind of row per study, each in a CSV file of its own, all in one folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resu.experiments import rows

__all__ = ["FieldRow", "KnownToolRow", "LeftOutRow", "NewToolRow", "OriginRow", "Results", "TwinRow", "add"]


@dataclass(frozen=True)
class TwinRow:
    """One network of one quantity.

    Attributes:
        quantity: Recording.
        way: ``"ridge"`` or one of :data:`resu.experiments.spinn.runs.WAYS`.
        physics: Whether the law was part of the loss.
        seed: Of everything random.
        sparsity: Fraction of the dense network's parameters that is gone.
        parameters: That are left.
        test: R² on held-out rows.
        val: R² on the validation part, against the variance of the training part.
        told: What the law says of held-out rows, with units, and its learned constants.
        seconds: Processor time, here and below.
    """

    quantity: str
    way: str
    physics: bool
    seed: int
    sparsity: float
    parameters: int
    test: float
    val: float
    told: str
    seconds: float


@dataclass(frozen=True)
class OriginRow:
    """R² at rolling origins, ``near`` one block ahead and ``far`` at all known blocks behind a gap."""

    quantity: str
    way: str
    physics: bool
    seed: int
    near: tuple[float, ...]
    far: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class LeftOutRow:
    """A tool or case that was left out, judged by a twin that does not know it; errors are in the target's unit.

    Attributes:
        test: R² on its rows; NaN where they do not vary.
        squared: Sum of squared errors.
        rows: Rows of the group.
        bias: Mean error.
        absolute: Mean absolute error.
    """

    quantity: str
    way: str
    group: int
    parameters: int
    test: float
    squared: float
    rows: int
    bias: float
    absolute: float
    seconds: float


@dataclass(frozen=True)
class KnownToolRow:
    """What candidates for the output layer do for ``group``, in a twin that knows neither it nor ``other``.

    Attributes:
        products: ``Σ eᵢ eⱼ`` over the rest of its life, for the errors of candidates i and j, row by row.
    """

    quantity: str
    group: int
    other: int
    products: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class NewToolRow:
    """A new tool: root mean squared errors on the rest of its life, in the target's unit.

    Attributes:
        rest: Rows of the rest.
        before: Of the twin that does not know it.
        mixed: Adapted, with shares that the other tools say.
        equal: Adapted, every candidate with the same share.
        single: Adapted, with the one candidate that is best for the other tools.
        retrained: Of a twin trained anew.
        cost: Multiply-adds of adapting over those of retraining.
        time: Processor time of adapting over that of retraining.
        shares: Of each candidate in ``mixed``.
    """

    quantity: str
    group: int
    seed: int
    rest: int
    before: float
    mixed: float
    equal: float
    single: float
    retrained: float
    cost: float
    time: float
    shares: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class FieldRow:
    """A known solution, learned: relative L2 error of the dense and of the sparse field."""

    quantity: str
    way: str
    seed: int
    sparsity: float
    parameters: int
    error: float
    told: str
    seconds: float


AnyRow = TwinRow | OriginRow | LeftOutRow | KnownToolRow | NewToolRow | FieldRow


@dataclass
class Results:
    """All rows that there are, by study; the file of each is named as the attribute."""

    twins: list[TwinRow] = field(default_factory=list)
    origins: list[OriginRow] = field(default_factory=list)
    left_out: list[LeftOutRow] = field(default_factory=list)
    known_tools: list[KnownToolRow] = field(default_factory=list)
    new_tools: list[NewToolRow] = field(default_factory=list)
    fields: list[FieldRow] = field(default_factory=list)

    @classmethod
    def read(cls, folder: str | Path) -> Results:
        """What the folder holds; nothing where it is empty or not there.

        Of a run that is there twice (it was cut off between two rows, and run again) the last row counts.

        Raises:
            ValueError: If a file has other columns.
        """
        found: dict[str, Any] = {}
        for name, kind in KINDS.items():
            every = rows.read(Path(folder) / f"{name}.csv", kind)
            found[name] = list({tuple(getattr(row, key, None) for key in RUN): row for row in every}.values())
        return cls(**found)


#: What tells runs of a study apart, where its rows have it.
RUN = ("quantity", "way", "physics", "group", "other", "seed")
KINDS: dict[str, Any] = {
    "twins": TwinRow,
    "origins": OriginRow,
    "left_out": LeftOutRow,
    "known_tools": KnownToolRow,
    "new_tools": NewToolRow,
    "fields": FieldRow,
}


def add(folder: str | Path, row: AnyRow) -> None:
    """Add one row to the file of its study."""
    name = next(name for name, kind in KINDS.items() if type(row) is kind)
    rows.append(Path(folder) / f"{name}.csv", row)
