"""Models that were made smaller, loaded again: by their configuration, and by ours where it cannot say the sizes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from resu.integrations.hf import check_directory, model_class, read_model, refuse_random
from resu.integrations.shrink.sizes import KEY, shrunk_class

__all__ = ["load_shrunk_transformer", "loadable_class"]


def load_shrunk_transformer(
    directory: str | os.PathLike[str],
    kind: Any = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> Any:
    """A model that ``resu shrink`` wrote, whether its architecture can be told its sizes or not.

    transformers computes the size of a head of BERT and its kin from their number, and its configurations hold one
    number for all blocks. A model with fewer heads than that allows has its sizes under ``resu_shrunk`` in
    ``config.json``; ``from_pretrained`` refuses it with a list of sizes that do not match, and this loads it. What
    comes back is of the class of transformers, nothing else; no code from the directory is run. Other directories load
    as with ``from_pretrained``.

    Args:
        directory: A local Hugging Face directory with safetensors.
        kind: A class of transformers, also an ``AutoModelFor…``, whose head may be new; None: the one that
            ``config.json`` names.
        dtype: Of the weights; None: as stored.
        device: Where to put it; None: the CPU.
        options: More for ``from_pretrained``, such as ``attn_implementation="eager"``.

    Returns:
        The ``PreTrainedModel`` in evaluation mode.

    Raises:
        FileNotFoundError: If the directory, its configuration or its weights are missing.
        FileFormatError: If weights are missing, or of other sizes than the configuration says.
        ValueError: If the weights are pickles or quantized, the architecture is not known, or the sizes are damaged.

    Example:
        >>> import resu  # doctest: +SKIP
        >>> model = resu.load_shrunk_transformer("minilm-small")  # doctest: +SKIP
    """
    folder = Path(directory)
    config = check_directory(folder)
    found = model_class(config, folder) if kind is None else loadable_class(kind, folder, config)
    model, missing, other = read_model(found, folder, dtype, **options)
    if kind is not None:  # which may have a head of its own, and a pooler that masked language models lack
        body = {id(parameter) for parameter in model.base_model.parameters()}
        missing &= {
            name
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if id(parameter) in body and ".pooler." not in f".{name}"
        }
    refuse_random(model, folder, [*sorted(other.values()), *sorted(missing)], f"config.json and {KEY!r} in it")
    return model if device is None else model.to(device)


def loadable_class(kind: Any, directory: str | os.PathLike[str], config: dict[str, Any] | None = None) -> Any:
    """The class whose ``from_pretrained`` loads a directory: ``kind`` itself, unless its sizes are under our key.

    Args:
        kind: A class of transformers, also an ``AutoModelFor…``.
        directory: The directory.
        config: Its ``config.json``, where it was read already.

    Raises:
        ValueError: If an ``AutoModelFor…`` has no class for the architecture.
    """
    stated = check_directory(directory) if config is None else config
    if KEY not in stated or getattr(kind, "resizes", False):
        return kind
    if (mapping := getattr(kind, "_model_mapping", None)) is not None:
        from transformers import AutoConfig

        read = type(AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False))
        if read not in mapping:
            raise ValueError(f"{kind.__name__} has no class for {stated.get('model_type')!r} models")
        kind = mapping[read]
        kind = kind[0] if isinstance(kind, (list, tuple)) else kind
    return shrunk_class(kind)
