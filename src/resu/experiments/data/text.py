"""A text as a sequence of characters, plain or ``.xz`` or ``.gz``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from resu.experiments.data.dataset import Text
from resu.experiments.data.folder import DataError, find_file, find_folder, read_bytes

__all__ = ["load_text", "load_tinyshakespeare"]


def load_text(path: str | Path, name: str | None = None, context: int = 64) -> Text:
    """A UTF-8 text: the last 10 % is the test part, the 5 % before it is held out for choices.

    Raises:
        DataError: If the file is no UTF-8 text, has more than 256 symbols, or is too short.
    """
    path = Path(path)
    try:
        text = read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    symbols = "".join(sorted(set(text)))
    if len(symbols) > 256:
        raise DataError(f"{path} has {len(symbols)} different characters; up to 256 are handled")
    if len(text) < 40 * (context + 1):
        raise DataError(f"{path} has {len(text)} characters; at least {40 * (context + 1)} are needed")
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    alphabet = np.array([ord(symbol) for symbol in symbols], "<u4")
    tokens = torch.from_numpy(np.searchsorted(alphabet, codes).astype(np.uint8))
    first, second = int(0.85 * len(tokens)), int(0.9 * len(tokens))
    return Text(name or path.name, tokens[:first], tokens[first:second], tokens[second:], symbols, context=context)


def load_tinyshakespeare(directory: str | Path | None = None) -> Text:
    """The 1.1 M characters of tiny shakespeare."""
    folder = find_folder("tinyshakespeare", directory)
    return load_text(find_file(folder, ["input.txt.xz", "input.txt"]), "tinyshakespeare")
