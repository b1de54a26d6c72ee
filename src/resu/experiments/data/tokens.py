"""Texts as numbers: of their characters, or of their most frequent words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from resu.experiments.data.folder import DataError

__all__ = ["UNKNOWN", "encode_characters", "encode_words"]

UNKNOWN, END = "<unk>", "<eos>"


def encode_characters(parts: Sequence[str], where: object = "the text") -> tuple[list[Tensor], str]:
    """``(numbers of each part, alphabet)``; the alphabet is that of all parts, in the order of code points.

    Raises:
        DataError: If there are more than 256 different characters.

    Example:
        >>> numbers, alphabet = encode_characters(["abca", "b", "c"])
        >>> alphabet, [part.tolist() for part in numbers]
        ('abc', [[0, 1, 2, 0], [1], [2]])
    """
    symbols = "".join(sorted(set().union(*parts)))
    if len(symbols) > 256:
        raise DataError(f"{where} has {len(symbols)} different characters; up to 256 are handled")
    alphabet = np.array([ord(symbol) for symbol in symbols], "<u4")
    tokens = []
    for part in parts:
        codes = np.frombuffer(part.encode("utf-32-le"), "<u4")
        tokens.append(torch.from_numpy(np.searchsorted(alphabet, codes).astype(np.uint8)))
    return tokens, symbols


def encode_words(parts: Sequence[str], vocabulary: int = 10_000) -> tuple[list[Tensor], tuple[str, ...]]:
    r"""``(numbers of each part, vocabulary)``: what stands between blanks, and ``<eos>`` at the end of each line.

    The vocabulary is ``<unk>`` and the most frequent words of the first part; of equally frequent ones, those that
    come first in it. All other words are ``<unk>``. A text that has ``<unk>`` in it keeps it.

    Raises:
        DataError: If the vocabulary has no room for a word.

    Example:
        >>> numbers, words = encode_words(["a b a\n", "b c a"], vocabulary=3)
        >>> words, [part.tolist() for part in numbers]
        (('<unk>', 'a', 'b'), [[1, 2, 1, 0], [2, 0, 1]])
    """
    if vocabulary < 2:
        raise DataError(f"data.vocabulary must be at least 2 ({UNKNOWN} and a word), got {vocabulary}")
    split = [part.replace("\n", f" {END} ").split() for part in parts]
    counts = Counter(split[0])
    del counts[UNKNOWN]
    words = (UNKNOWN, *(word for word, _ in counts.most_common(vocabulary - 1)))
    number = {word: i for i, word in enumerate(words)}
    return [torch.tensor([number.get(w, 0) for w in some], dtype=torch.int32) for some in split], words
