"""Text files for a Hugging Face model: read, tokenised, and cut into calibration batches."""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resu.core.randomness import derived_generator

__all__ = [
    "calibration_batches",
    "cut_text",
    "default_length",
    "kind_of",
    "padded_batch",
    "read_content",
    "read_texts",
    "token_ids",
]

_LONGEST = 2048  # tokens; what the papers on one-shot pruning calibrate and evaluate with


def read_texts(file: str | os.PathLike[str], *, lines: bool = False, encoding: str = "utf-8") -> list[str]:
    r"""The texts of a file.

    Args:
        file: ``.jsonl``: one object with a ``"text"`` per line is one text. Anything else is plain text: one
            text, or one per line that is not blank, with ``lines``. Either may be compressed (``.xz``).
        lines: See above; a jsonl file has one text per line anyway.
        encoding: As Python names it.

    Raises:
        FileNotFoundError: If there is no such file.
        IsADirectoryError: If it is a folder.
        ValueError: If it is no UTF-8, no JSON, lacks ``"text"`` or is empty; the line is named.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        ...     _ = file.write('{"text": "One."}\n{"text": "Two."}\n')
        ...     file.flush()
        ...     read_texts(file.name)
        ['One.', 'Two.']
    """
    path = Path(file)
    content = read_content(path, encoding)
    if kind_of(path) in (".jsonl", ".ndjson"):
        texts = [_text_of(line, path, number) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    elif lines:
        texts = [line.strip() for line in content.splitlines()]
    else:
        texts = [content]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{path} holds no text")
    return texts


def kind_of(path: str | os.PathLike[str]) -> str:
    """The ending that says what a text file holds, before an ``.xz``.

    Example:
        >>> kind_of("a/b.jsonl.xz"), kind_of("c.TXT")
        ('.jsonl', '.txt')
    """
    name = Path(path)
    return (Path(name.stem) if name.suffix == ".xz" else name).suffix.lower()


def read_content(file: str | os.PathLike[str], encoding: str = "utf-8") -> str:
    """All of a text file, which may be compressed (``.xz``).

    Args:
        file: Any text.
        encoding: As Python names it.

    Raises:
        FileNotFoundError: If there is no such file.
        IsADirectoryError: If it is a folder.
        ValueError: If it is damaged, not in this encoding, or the encoding is not known.
    """
    path = Path(file)
    wanted = 'give a .txt or a .jsonl with one {"text": …} per line'
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; {wanted}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; {wanted}")
    said = "UTF-8" if encoding == "utf-8" else encoding
    try:
        data = path.read_bytes()
        if path.suffix == ".xz":
            data = lzma.decompress(data)
        # Some editors begin a text with a byte order mark.
        content = data.decode("utf-8-sig" if encoding == "utf-8" else encoding)
    except lzma.LZMAError as error:
        raise ValueError(f"{path} is damaged, or no xz: {error}") from None
    except LookupError:
        raise ValueError(
            f"unknown encoding {encoding!r}; known are those of Python, such as utf-8 and latin-1"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no {said} text: {error}; {wanted}") from None
    if "\0" in content:  # UTF-16 without its mark reads as UTF-8 too
        raise ValueError(f"{path} is no {said} text: it holds NUL characters; {wanted}")
    return content.replace("\r\n", "\n").replace("\r", "\n")


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:  # also of numbers with too many digits
        raise ValueError(f"line {number} of {path} is no JSON: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("text"), str):
        raise ValueError(f'line {number} of {path} has no "text"; each line is an object such as {{"text": "…"}}')
    try:
        found["text"].encode()
    except UnicodeEncodeError:
        raise ValueError(f"line {number} of {path} holds half of a surrogate pair (\\ud800 …), no character") from None
    return str(found["text"])


def default_length(tokenizer: Any, model: Any = None) -> int:
    """Tokens per sample where none are asked for: what the model was made for, at most 2048."""
    limits = [_LONGEST, int(getattr(tokenizer, "model_max_length", None) or _LONGEST)]
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        limits.append(positions)
    return min(limits)


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids per text, with the special tokens the tokenizer adds; no text is too long."""
    # verbose=False: that a text is longer than the model's context is no mistake here, it is cut afterwards.
    found = tokenizer(list(texts), add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
    return [list(ids) for ids in found]


def calibration_batches(
    tokenizer: Any,
    file: str | os.PathLike[str],
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    *,
    lines: bool = False,
    batch_size: int = 8,
) -> list[dict[str, Tensor]]:
    """Batches to calibrate on, drawn from a text file.

    Without ``lines`` (decoders) the texts are strung together and cut into pieces of ``length`` tokens, of which
    ``samples`` are drawn without repetition. With ``lines`` (encoders) every line, or every text of a jsonl file, is a
    sample of its own, cut at ``length`` and padded; padding is marked in ``attention_mask``, so that no statistic
    counts it.

    Args:
        tokenizer: Of :func:`resu.integrations.hf.load_model`.
        file: See :func:`read_texts`.
        samples: How many.
        length: Tokens per sample; None: :func:`default_length`.
        seed: Which samples are drawn, and their order.
        lines: See above.
        batch_size: Samples per batch.

    Returns:
        Mappings with ``input_ids`` and ``attention_mask``, int64 ``[batch, tokens]`` each.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is too short for that many samples; the error says how many it has.
    """
    if samples < 1 or batch_size < 1 or (length is not None and length < 2):
        raise ValueError(
            f"samples and batch_size must be 1 or more, length 2 or more; got {samples}, {batch_size} and {length}"
        )
    length = default_length(tokenizer) if length is None else length
    generator = derived_generator(seed, "calibration")
    texts = read_texts(file, lines=lines)
    pieces: list[list[int]] = []
    rest: list[int] = []
    # Texts in random order, and no more of them tokenised than are needed: a file may be large.
    for ids in _tokenised(tokenizer, texts, torch.randperm(len(texts), generator=generator).tolist()):
        if lines:
            pieces.append(cut_text(tokenizer, ids, length))
        else:
            rest += ids
            whole = len(rest) // length * length
            pieces += [rest[at : at + length] for at in range(0, whole, length)]
            rest = rest[whole:]
        if len(pieces) >= samples:
            break
    if len(pieces) < samples:
        has = f"{len(pieces)} texts" if lines else f"{len(pieces)} pieces of {length} tokens"
        raise ValueError(
            f"{file} is too short: {samples} samples are asked for, it has {has}; give a longer file, fewer "
            f"samples{'' if lines else ' or a smaller length'}"
        )
    chosen = [pieces[index] for index in torch.randperm(len(pieces), generator=generator)[:samples].tolist()]
    if lines:  # batches of similar length, so that there is little padding
        chosen.sort(key=len)
    return [padded_batch(tokenizer, chosen[at : at + batch_size]) for at in range(0, samples, batch_size)]


def _tokenised(tokenizer: Any, texts: Sequence[str], order: Sequence[int]) -> Iterator[list[int]]:
    for at in range(0, len(order), 256):
        yield from token_ids(tokenizer, [texts[index] for index in order[at : at + 256]])


def cut_text(tokenizer: Any, ids: list[int], length: int) -> list[int]:
    """At most ``length`` tokens of a text, with its closing special token still the last one."""
    if len(ids) <= length:
        return ids
    closing = getattr(tokenizer, "sep_token_id", None)
    return [*ids[: length - 1], ids[-1]] if closing is not None and ids[-1] == closing else ids[:length]


def padded_batch(tokenizer: Any, pieces: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Ids and attention mask ``[batch, longest]``, padded on the right; what fills is never looked at."""
    pad = getattr(tokenizer, "pad_token_id", None)
    longest = max(len(ids) for ids in pieces)
    filled = torch.full((len(pieces), longest), 0 if pad is None else int(pad))
    mask = torch.zeros(len(pieces), longest, dtype=torch.int64)
    for row, ids in enumerate(pieces):
        filled[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
    return {"input_ids": filled, "attention_mask": mask}
