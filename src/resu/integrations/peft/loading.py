"""Adapter files: what is in them is checked before a layer takes it."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resu.core.mask import SparseMask

__all__ = ["check_filled", "check_shapes", "make_room", "prepare", "read_mask"]

_PREFIX = "base_model.model."


def prepare(model: nn.Module, kind: type, adapter: str, state: Mapping[str, Tensor]) -> None:
    """Have every layer of ``kind`` make room for its tensors in an adapter file; they are loaded after it.

    Args:
        model: A ``PeftModel``, or a model with layers injected.
        kind: The tuner layer class; it has ``parts()`` and ``expect(adapter, tensors, name)``.
        adapter: Name of the adapter to fill.
        state: The file: ``{module name.part: tensor}``, with or without PEFT's prefix.

    Raises:
        ValueError: If a layer has no tensors there, tensors have no layer, or do not fit (the layer is named), or the
            adapter is merged now.
    """
    layers: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kind) and adapter in module._all_available_adapter_names()  # type: ignore[attr-defined]
    }
    for name, layer in layers.items():
        if adapter in layer.merged_adapters:
            raise ValueError(f"adapter {adapter!r} is merged; call unmerge_adapter() before loading it anew")
        found = {part: _look_up(state, f"{name}.{part}") for part in layer.parts()}
        missing = [part for part, tensor in found.items() if tensor is None]
        if missing:
            raise ValueError(
                f"the adapter file holds no {', '.join(missing)} for {name}; it was made for other target modules or "
                "another method, or is damaged"
            )
        layer.expect(adapter, found, name)
    parts = {part for layer in layers.values() for part in layer.parts()}
    known = {f"{name.removeprefix(_PREFIX)}.{part}" for name in layers for part in parts}
    stray = [key for key in state if key.rpartition(".")[2] in parts and key.removeprefix(_PREFIX) not in known]
    if stray:
        raise ValueError(
            f"the adapter file holds tensors for modules that are no targets here: {', '.join(stray[:4])}"
            f"{', …' if len(stray) > 4 else ''}; it was made for another model"
        )


def _look_up(state: Mapping[str, Tensor], key: str) -> Tensor | None:
    for candidate in (key, _PREFIX + key, key.removeprefix(_PREFIX)):
        if candidate in state:
            return state[candidate]
    return None


def read_mask(bits: Tensor, shape: Sequence[int], name: str) -> SparseMask:
    """The mask of a layer from the bits in an adapter file."""
    try:
        return SparseMask.from_packed(bits, shape)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; the adapter was made for another model, or its file is damaged") from None


def check_shapes(name: str, given: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ``ValueError`` unless the tensors of a layer have these shapes."""
    for part, shape in shapes.items():
        if tuple(given[part].shape) != shape:
            raise ValueError(
                f"{name}: {part} has shape {tuple(given[part].shape)}, its mask needs {shape}; the adapter file is "
                "damaged"
            )


def make_room(entries: MutableMapping[str, Tensor] | Any, adapter: str, like: Tensor) -> None:
    """Give the entry of an adapter the shape of ``like``; one that has it stays the same object (optimizers)."""
    own = entries[adapter]
    if own.shape == like.shape:
        return
    fresh = torch.empty(like.shape, dtype=own.dtype, device=own.device)
    entries[adapter] = nn.Parameter(fresh, requires_grad=own.requires_grad) if isinstance(own, nn.Parameter) else fresh


def check_filled(bits: Tensor, adapter: str) -> None:
    """Raise ``RuntimeError`` if an adapter waits for its file."""
    if bits.numel() == 0:
        raise RuntimeError(
            f"adapter {adapter!r} has no mask and no values yet: its configuration came from a file (stored=True), so "
            "they come from the adapter file. Use PeftModel.from_pretrained() or load_adapter(), or set "
            "config.stored = False to make new ones"
        )
