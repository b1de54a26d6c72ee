"""A text as a sequence of characters or words, plain or ``.xz`` or ``.gz``, in one file or in three."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from resu.experiments.data.dataset import Text
from resu.experiments.data.folder import DataError, find_file, find_folder, read_bytes
from resu.experiments.data.tokens import encode_characters, encode_words

__all__ = ["Level", "load_text", "load_text_folder", "load_tinyshakespeare", "load_war_and_peace"]

Level = Literal["character", "word"]

_TEXT = re.compile(r"\.(txt|tokens|raw)(\.xz|\.gz)?$")
_PARTS = {"train": ("train",), "val": ("valid", "val", "dev"), "test": ("test",)}


def load_text(
    path: str | Path,
    name: str | None = None,
    context: int = 64,
    *,
    level: Level = "character",
    vocabulary: int = 10_000,
    evaluation_windows: int | None = 256,
) -> Text:
    """A UTF-8 text: the last 10 % is the test part, the 5 % before it is held out for choices.

    Args:
        path: The file.
        name: What results call it; the file's name without it.
        context: Length of a window.
        level: What a symbol is.
        vocabulary: How many words are told apart, where words are the symbols.
        evaluation_windows: How many windows stand for a part; None: all.

    Raises:
        DataError: If the file is no UTF-8 text, has more than 256 characters to tell apart, or is too short.
    """
    path = Path(path)
    text = _read(path)
    if len(text) < 40 * (context + 1):
        raise DataError(f"{path} has {len(text)} characters; at least {40 * (context + 1)} are needed")
    first, second = int(0.85 * len(text)), int(0.9 * len(text))
    parts = text[:first], text[first:second], text[second:]
    return _text(name or path.name, parts, context, level, vocabulary, evaluation_windows, path)


def load_text_folder(
    directory: str | Path | None = None,
    *,
    context: int = 64,
    level: Level = "character",
    vocabulary: int = 10_000,
    evaluation_windows: int | None = None,
) -> Text:
    """A text of your own: one file (:func:`load_text`), or a folder with a file for each part.

    The files of a folder are told by their names: one has the word ``train`` in it, one ``valid``, ``val`` or
    ``dev``, one ``test``.

    Raises:
        DataError: If there is no such file or folder, a part is missing or there are two, or one is too short.
    """
    if directory is None:
        raise DataError("data 'text' needs data.dir: a text file, or a folder with files for train, valid and test")
    path = Path(directory)
    if path.is_file():
        found = load_text(
            path, None, context, level=level, vocabulary=vocabulary, evaluation_windows=evaluation_windows
        )
        return found
    if not path.is_dir():
        raise DataError(f"no text at {path}: it is neither a file nor a folder")
    parts = [_read(_part_file(path, part)) for part in _PARTS]
    return _text(path.name, parts, context, level, vocabulary, evaluation_windows, path)


def load_tinyshakespeare(
    directory: str | Path | None = None,
    *,
    context: int = 64,
    level: Level = "character",
    vocabulary: int = 10_000,
    evaluation_windows: int | None = 256,
) -> Text:
    """The 1.1 M characters of tiny shakespeare."""
    file = find_file(find_folder("tinyshakespeare", directory), ["input.txt.xz", "input.txt"])
    return load_text(
        file, "tinyshakespeare", context, level=level, vocabulary=vocabulary, evaluation_windows=evaluation_windows
    )


def load_war_and_peace(
    directory: str | Path | None = None,
    *,
    context: int = 64,
    level: Level = "word",
    vocabulary: int = 10_000,
    evaluation_windows: int | None = None,
) -> Text:
    """War and Peace, 3.3 M characters in three parts."""
    folder = find_folder("war_and_peace", directory)
    parts = [_read(_part_file(folder, part)) for part in _PARTS]
    return _text("war-and-peace", parts, context, level, vocabulary, evaluation_windows, folder)


def _read(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error


def _part_file(folder: Path, part: str) -> Path:
    words = _PARTS[part]
    there = [f for f in sorted(folder.iterdir()) if f.is_file() and _TEXT.search(f.name)]
    found = [file for file in there if not set(words).isdisjoint(re.split(r"[^a-z]+", file.name.lower()))]
    if len(found) != 1:
        raise DataError(
            f"{folder} needs one text file with {' or '.join(words)} in its name, got {len(found)} among "
            f"{', '.join(file.name for file in there) or 'no text files'}; a single file can be given instead, "
            "which is split into all three parts"
        )
    return found[0]


def _text(
    name: str,
    parts: Sequence[str],
    context: int,
    level: Level,
    vocabulary: int,
    evaluation_windows: int | None,
    where: Path,
) -> Text:
    if context < 1:
        raise DataError(f"data.context must be at least 1, got {context}")
    encoded = encode_characters(parts, where) if level == "character" else encode_words(parts, vocabulary)
    (train, val, test), symbols = encoded
    for part, some in zip(_PARTS, (train, val, test), strict=True):
        if len(some) < context + 1:
            raise DataError(f"the {part} part of {where} has {len(some)} symbols; a window needs {context + 1}")
    return Text(name, train, val, test, symbols, context=context, evaluation_windows=evaluation_windows)
