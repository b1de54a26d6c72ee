"""Rows of results in CSV files that several runs may append to and that a crash does not spoil."""

from __future__ import annotations

import csv
import io
import os
import typing
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["append", "as_csv", "read"]

T = TypeVar("T")


def _columns(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _line(values: Iterable[object]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()


def as_csv(found: Sequence[Any]) -> str:
    """Rows, dataclasses of one kind, as the text of a file that :func:`read` reads."""
    columns = _columns(found[0]) if found else ()
    return "".join([_line(columns), *(_line(_cells(row)) for row in found)])


def _cells(row: Any) -> list[object]:
    """The values of a row; of a tuple its elements with spaces between them."""
    values = [getattr(row, name) for name in _columns(row)]
    return [" ".join(map(str, value)) if isinstance(value, tuple) else value for value in values]


def append(path: str | Path, row: Any) -> None:
    """Add one row, a dataclass; the line goes out in a single write, so that a reader or a second writer sees it whole.

    Raises:
        ValueError: If the file has other columns.
    """
    path, columns = Path(path), _columns(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = _line(_cells(row))
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(file).st_size
        if size == 0:
            text = _line(columns) + text
        else:
            with open(path, encoding="utf-8", newline="") as existing:
                _check_columns(_fields(existing.readline()), columns, path)
            if os.pread(file, 1, size - 1) != b"\n":  # the last writer was cut off: leave its line behind
                text = "\n" + text
        os.write(file, text.encode())
    finally:
        os.close(file)


def _fields(line: str) -> list[str]:
    return next(csv.reader([line]), [])


def _check_columns(found: Sequence[str], columns: Sequence[str], path: Path) -> None:
    if tuple(found) != tuple(columns):
        raise ValueError(f"{path} has the columns {', '.join(found)}; expected {', '.join(columns)}")


def read(path: str | Path, kind: type[T]) -> list[T]:
    """The rows of a CSV in order, as dataclasses of ``kind``; none if there is no file.

    A line that was cut off is left out.

    Raises:
        ValueError: If the file has other columns.
    """
    path = Path(path)
    if not path.exists():
        return []
    types, columns = typing.get_type_hints(kind), _columns(kind)
    rows = []
    with open(path, encoding="utf-8", newline="") as file:
        lines = file.read().split("\n")
    _check_columns(_fields(lines[0]), columns, path)
    # Line by line: a quote that a cut-off line left open must not swallow the next one.
    for values in map(_fields, lines[1:-1]):
        # Two writers that both found no file have each written the head.
        if len(values) != len(columns) or not values[-1] or tuple(values) == columns:
            continue
        rows.append(kind(**{n: _value(types[n], text) for n, text in zip(columns, values, strict=True)}))
    return rows


def _value(kind: Any, text: str) -> Any:
    if typing.get_origin(kind) is tuple:  # `tuple[float, ...]`
        return tuple(_value(typing.get_args(kind)[0], part) for part in text.split())
    optional = [one for one in typing.get_args(kind) if one is not type(None)]  # `float | None`: empty is None
    if optional:
        return _value(optional[0], text) if text else None
    return text == "True" if kind is bool else kind(text)
