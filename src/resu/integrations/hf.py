"""Hugging Face model directories, loaded.

Only local directories and only safetensors: nothing is fetched, no pickle is opened, no code of a model is run.
Directories are written by :mod:`resu.integrations.hf_save`; texts to calibrate on are in
:mod:`resu.integrations.hf_text`, perplexity in :mod:`resu.integrations.hf_evaluate`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resu.core.io import FileFormatError
from resu.core.shards import Shards
from resu.formats.compressed_config import LAYOUTS as SPARSE_LAYOUTS
from resu.formats.pack_quantized import FORMAT

__all__ = [
    *("check_directory", "has_tokenizer", "load_model", "load_tokenizer", "model_class", "quiet", "read_model"),
    *("refuse_random", "widest_dtype"),
]

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model"),
    "sentencepiece.bpe.model",
)


def check_directory(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The ``config.json`` of a model directory that :func:`load_model` can load, read and checked.

    Raises:
        FileNotFoundError: If there is no such directory, no ``config.json`` or no weights.
        ValueError: If the weights are pickles or quantized, or the configuration is no JSON object.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no directory; give the one that holds config.json and model.safetensors")
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json, so it is no Hugging Face model directory")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FileFormatError(f"{file} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise FileFormatError(f"{file} holds a {type(config).__name__}, not an object")
    if config.get("quantization_config"):
        _refuse_stored_otherwise(config["quantization_config"], folder)
    return config


def _refuse_stored_otherwise(stated: Mapping[str, Any], folder: Path) -> None:
    packed = (
        stated.get("format") == FORMAT or str((stated.get("sparsity_config") or {}).get("format")) in SPARSE_LAYOUTS
    )
    if stated.get("quant_method") == "compressed-tensors" and packed:  # what resu itself writes
        raise ValueError(
            f"the weights of {folder} are not stored densely; make it dense first: resu export {folder} --to dense "
            "--out DIR"
        )
    method = stated.get("quant_method", "an unknown method")
    raise ValueError(f"{folder} is quantized ({method}); take the model it was made from")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and load reports of transformers: what matters of them is checked here and raised."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def model_class(config: Mapping[str, Any], folder: Path) -> Any:
    """The class that a ``config.json`` names under ``architectures``; ``AutoModel`` where it names none.

    Raises:
        ValueError: If transformers does not have it.
    """
    import transformers

    from resu.integrations.shrink.loading import loadable_class

    named = config.get("architectures") or list((config.get("auto_map") or {}).values())
    if not named:
        return loadable_class(transformers.AutoModel, folder, dict(config))
    found = getattr(transformers, str(named[0]), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(
            f"{folder} needs {named[0]!r}, which transformers {transformers.__version__} does not have (code that "
            "comes with a model is not run); methods without data, such as magnitude, do not load it"
        )
    return loadable_class(found, folder, dict(config))  # what resu shrink made may have sizes of its own


def widest_dtype(shards: Shards) -> torch.dtype:
    """The float dtype that holds all weights of a checkpoint without rounding."""
    found = Counter(shards.dtype(name) for name in shards.names)
    floats = {dtype for dtype in found if dtype.is_floating_point}
    if odd := floats - set(_FLOATS):
        raise ValueError(
            f"{shards.folder} holds weights in {', '.join(map(str, odd))}, which are not pruned; known: float"
        )
    if len(floats) == 1:
        return floats.pop()
    return torch.float64 if torch.float64 in floats else torch.float32


def read_model(
    kind: Any, folder: Path, dtype: torch.dtype | None = None, **options: Any
) -> tuple[Any, set[str], dict[str, str]]:
    """A model with the weights of a directory, and which of its own it lacks: those are random.

    Args:
        kind: The class whose ``from_pretrained`` loads it (:func:`model_class`).
        folder: Holds ``config.json`` and safetensors.
        dtype: Of the weights; None: as they are stored (the widest, where a checkpoint mixes several).
        options: More for ``from_pretrained``.

    Returns:
        The model in evaluation mode; names that are missing; ``{name: in words}`` of those in another shape.
    """
    stored = widest_dtype(Shards.open(folder))
    with quiet():
        model, info = kind.from_pretrained(
            folder,
            dtype=stored if dtype is None else dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # whoever asks says which may be so
            output_loading_info=True,
            **options,
        )
    other = {key: f"{key} ({tuple(there)}, needed {tuple(here)})" for key, there, here in info["mismatched_keys"]}
    return model.eval(), set(info["missing_keys"]), other


def refuse_random(model: Any, folder: Path, lost: Collection[str], check: str = "config.json") -> None:
    """Refuse a model some of whose weights would be random.

    Raises:
        FileFormatError: If any is lost.
    """
    if lost:
        raise FileFormatError(
            f"{folder} lacks weights of {type(model).__name__}, or has them in another shape: "
            f"{', '.join([*lost][:5])}; they would be random. Check {check}"
        )


def load_model(
    directory: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> tuple[nn.Module, Any]:
    """The model and the tokenizer of a local Hugging Face directory.

    The class is the one that ``config.json`` names under ``architectures`` (``AutoModel`` where it names none), so
    that what is saved again is the same kind of model.

    Args:
        directory: Holds ``config.json`` and safetensors, in one file or in shards.
        dtype: Of the weights; None: as they are stored (the widest, where a checkpoint mixes several).
        device: Where to put it; None: the CPU.

    Returns:
        ``(model, tokenizer)``: the model in evaluation mode; the tokenizer is None if the directory has none.

    Raises:
        FileNotFoundError: If the directory, its configuration or a shard is missing.
        FileFormatError: If a file is damaged, or a weight of the model is not in the files.
        ValueError: If the weights are pickles or quantized, or the architecture is not known.
    """
    folder = Path(directory)
    model, missing, other = read_model(model_class(check_directory(folder), folder), folder, dtype)
    refuse_random(model, folder, [*sorted(other.values()), *sorted(missing)])
    return model if device is None else model.to(device), load_tokenizer(folder)


def has_tokenizer(folder: Path) -> bool:
    """Whether any file of a tokenizer lies in a directory."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(directory: str | os.PathLike[str]) -> Any:
    """The tokenizer of a local Hugging Face directory, or None if it has none.

    Raises:
        ValueError: If there is one that cannot be read; the error says why.
    """
    from transformers import AutoTokenizer

    folder = Path(directory)
    if not has_tokenizer(folder):
        return None
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a tokenizer's parser raises: to the user it is one thing
        raise ValueError(f"cannot read the tokenizer of {folder}: {' '.join(str(error).split())}") from error
