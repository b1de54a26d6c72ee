"""Text to fine-tune on: files, labels, a held-out share, and token ids ready for batches."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resu.core.randomness import derived_generator
from resu.integrations.hf_text import cut_text, kind_of, read_content, read_texts, token_ids

__all__ = ["Examples", "Row", "has_labels", "label_names", "read_examples", "rows_of", "split"]

#: One sample: ``input_ids``, ``index`` (its place in the data) and, for classification, ``labels``.
Row = dict[str, Any]
_TABLES = {".csv": ",", ".tsv": "\t"}
_JSON = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Examples:
    """Texts, and a label for each where there are labels."""

    texts: list[str]
    labels: list[str] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> Examples:
        """Some of them, in this order."""
        labels = self.labels
        return Examples([self.texts[i] for i in indices], None if labels is None else [labels[i] for i in indices])


def has_labels(file: str | os.PathLike[str], encoding: str = "utf-8") -> bool:
    """Whether a file says by itself that it holds labels: a table does, and a jsonl whose first line has a label."""
    kind = kind_of(file)
    if kind in _JSON:
        first = next((line for line in read_content(file, encoding).split("\n") if line.strip()), "{}")
        try:
            return "label" in json.loads(first)
        except (ValueError, TypeError):
            return False
    return kind in _TABLES


def read_examples(
    file: str | os.PathLike[str], *, labelled: bool, lines: bool = False, encoding: str = "utf-8"
) -> Examples:
    r"""The samples of a file, which may be compressed (``.xz``).

    Args:
        file: With labels: ``.jsonl`` with ``{"text": …, "label": …}`` per line; ``.csv`` or ``.tsv`` with columns
            ``text`` and ``label`` (without a header: text, label); anything else: each line a label, a space, a text.
            Without: see :func:`resu.integrations.hf_text.read_texts`.
        labelled: Whether labels are wanted.
        lines: Without labels: whether each line is a text of its own.
        encoding: As Python names it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line cannot be read (it is named), or there is none.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        ...     _ = file.write("1 a good film\n0 a bad one\n")
        ...     file.flush()
        ...     read_examples(file.name, labelled=True)
        Examples(texts=['a good film', 'a bad one'], labels=['1', '0'])
    """
    if not labelled:
        return Examples(read_texts(file, lines=lines, encoding=encoding))
    content, path = read_content(file, encoding), Path(file)
    kind = kind_of(path)
    if kind in _JSON:
        pairs = [_of_json(line, path, n) for n, line in enumerate(content.split("\n"), 1) if line.strip()]
    elif kind in _TABLES:
        pairs = _of_table(content, _TABLES[kind], path)
    else:
        pairs = [_of_line(line, path, n) for n, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not pairs:
        raise ValueError(f"{path} holds no text")
    return Examples([text for text, _ in pairs], [label for _, label in pairs])


def _of_json(line: str, path: Path, number: int) -> tuple[str, str]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number} of {path} is no JSON: {error}") from None
    text, label = (found.get("text"), found.get("label")) if isinstance(found, dict) else (None, None)
    if not isinstance(text, str) or not isinstance(label, (str, int)):
        raise ValueError(f'line {number} of {path} is not like {{"text": "…", "label": "…"}}')
    return text, str(label)


def _of_table(content: str, delimiter: str, path: Path) -> list[tuple[str, str]]:
    rows = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    pairs: list[tuple[str, str]] = []
    columns = (0, 1)
    try:
        for first, row in enumerate(row for row in rows if row):
            names = [cell.strip().lower() for cell in row]
            if not first and {"text", "label"} <= set(names):
                columns = (names.index("text"), names.index("label"))
            elif not first and {"text", "label"} & set(names):
                raise ValueError(
                    f"the columns of {path} are {', '.join(row[:8])}; they must be named text and label (others may "
                    "stand beside them), or there is no header and they come in this order"
                )
            elif len(row) <= max(columns):
                raise ValueError(f"line {rows.line_num} of {path} has no text and label")
            else:
                pairs.append((row[columns[0]], row[columns[1]].strip()))
    except csv.Error as error:
        raise ValueError(f"line {rows.line_num} of {path} cannot be read: {error}") from None
    return pairs


def _of_line(line: str, path: Path, number: int) -> tuple[str, str]:
    label, space, text = line.strip().partition(" ")
    if not space or not text.strip():
        raise ValueError(f"line {number} of {path} is no label, space and text: {line[:40]!r}")
    return text.strip(), label


def label_names(labels: Sequence[str], known: Mapping[str, int] | None = None, where: object = "the data") -> list[str]:
    """Names of the classes in order: those a model knows already if they are all among them, else those of the data.

    Args:
        labels: Of the data.
        known: ``label2id`` of a model's configuration.
        where: For errors.

    Raises:
        ValueError: If there are fewer than two classes.

    Example:
        >>> label_names(["10", "9", "9"]), label_names(["pos", "neg"]), label_names(["b", "a"], {"b": 0, "a": 1})
        (['9', '10'], ['neg', 'pos'], ['b', 'a'])
    """
    found = set(labels)
    if known and found <= set(known):
        return sorted(known, key=lambda name: known[name])
    if len(found) < 2:
        raise ValueError(f"{where} has one label only, {next(iter(found), None)!r}; a classification needs two or more")
    numbers = all(name.removeprefix("-").isdecimal() for name in found)
    return sorted(found, key=int) if numbers else sorted(found)


def split(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """Training and held-out samples: each is whole, in the order of the file, drawn by ``seed``.

    Raises:
        ValueError: If one of the two would be empty.
    """
    n, held = len(examples), max(1, round(len(examples) * share))
    if held >= n:
        raise ValueError(f"{n} samples are too few to hold out {share:g} of them; give a validation file")
    order = torch.randperm(n, generator=derived_generator(seed, "validation")).tolist()
    return examples.take(sorted(order[held:])), examples.take(sorted(order[:held]))


def rows_of(tokenizer: Any, examples: Examples, length: int, *, names: Sequence[str] = (), strung: bool) -> list[Row]:
    """Token ids of samples.

    Args:
        tokenizer: Of the model.
        examples: Texts, with labels or without.
        length: Tokens at which a text is cut.
        names: Of the classes, in order.
        strung: Whether texts are strung together and cut into pieces of ``length`` tokens (causal language models).

    Raises:
        ValueError: If a label is not in ``names``, or the texts give no sample.
    """
    ids = [
        found for at in range(0, len(examples), 256) for found in token_ids(tokenizer, examples.texts[at : at + 256])
    ]
    if strung:
        every = [token for text in ids for token in text]
        pieces = [every[at : at + length] for at in range(0, len(every), length)]
        pieces = [piece for piece in pieces if len(piece) == length] or [piece for piece in pieces if len(piece) > 1]
        if not pieces:
            raise ValueError("the text is too short: it has fewer than two tokens")
        return [{"input_ids": piece, "index": i} for i, piece in enumerate(pieces)]
    rows: list[Row] = [{"input_ids": cut_text(tokenizer, text, length), "index": i} for i, text in enumerate(ids)]
    if examples.labels is not None:
        place = {name: i for i, name in enumerate(names)}
        if odd := sorted(set(examples.labels) - set(place)):
            raise ValueError(
                f"labels that the training data does not have: {', '.join(odd[:8])}; it has {', '.join(names)}"
            )
        for row, label in zip(rows, examples.labels, strict=True):
            row["labels"] = place[label]
    return rows
