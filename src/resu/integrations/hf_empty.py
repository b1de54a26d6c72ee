"""A Hugging Face model whose parameters take no memory, to be lent what lies on disk, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resu.core.io import FileFormatError
from resu.core.shards import Shards
from resu.integrations.hf import check_directory, model_class, quiet, widest_dtype
from resu.pruning.lending import without_memory
from resu.pruning.reconstruction import stored_names

__all__ = ["empty_model"]


def empty_model(directory: Path) -> Any:
    """The model of a directory in evaluation mode, with parameters of no memory (:func:`without_memory`) and no values.

    Raises:
        FileNotFoundError: If the directory, its configuration or a shard is missing.
        ValueError: If the architecture is not known, or weights lie in the files under other names or shapes than in
            the model (fused when loaded, renamed), so that they cannot be read one by one.
    """
    config = check_directory(directory)
    shards = Shards.open(directory)
    kind = model_class(config, directory)
    with quiet(), _without_parameters():
        from transformers import AutoConfig

        stated = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        make = getattr(kind, "_from_config", None) or kind.from_config  # AutoModel, where no class is named
        model = make(stated, dtype=widest_dtype(shards))
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                absent = known.setdefault(id(parameter), nn.Parameter(without_memory(parameter), requires_grad=False))
                module._parameters[name] = absent
    stored = stored_names(model, shards.entries)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, parameter in model.named_parameters():
        found = next((stored[n] for n in names[id(parameter)] if n in stored), None)
        if found is None:
            raise FileFormatError(
                f"{directory} has no tensor {name!r}, which {type(model).__name__} has: its weights are fused or "
                "renamed when it is loaded, and cannot be read block by block; load it and call resu.reconstruct"
            )
        if shards.shape(found) != parameter.shape:
            raise FileFormatError(
                f"{directory} has {found!r} as {tuple(shards.shape(found))}, {type(model).__name__} needs "
                f"{tuple(parameter.shape)}; check config.json"
            )
    return model.eval()


@contextmanager
def _without_parameters() -> Iterator[None]:
    """Parameters that modules register go to the meta device, one by one; buffers are made as always."""
    register = nn.Module.register_parameter

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.data.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = registered  # type: ignore[method-assign, assignment]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
