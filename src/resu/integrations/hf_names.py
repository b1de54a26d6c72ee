"""Masks between a model and its files, where transformers stores a weight under other names or in parts (experts)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from resu.core.mask import SparseMask
from resu.core.shards import Shards

__all__ = ["masks_as_loaded", "masks_as_stored", "parts_in_file"]


def parts_in_file(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What becomes of tensors, as shaped as the parameters they are named after, when the model is saved.

    Args:
        model: A ``PreTrainedModel``.
        tensors: By parameter name, of any dtype.

    Returns:
        By the names of the file, as ``save_pretrained`` writes them: renamed, divided, transposed.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before transformers 5 a weight was stored as it was
        return dict(tensors)
    return dict(revert_weight_conversion(model, dict(tensors)))


def masks_as_stored(model: Any, masks: Mapping[str, SparseMask], written: Shards) -> dict[str, dict[str, SparseMask]]:
    """Masks of weights that are not in the file under their own name.

    Args:
        model: The model that was saved.
        masks: By parameter name.
        written: Its file.

    Returns:
        For each such name its masks by the names of the file; a mask that does not fit the file is left out.
    """
    found = {}
    for name, mask in masks.items():
        if name in written.entries:
            continue
        parts = parts_in_file(model, {name: mask.mask.to(torch.uint8)})
        if all(part in written.entries and written.shape(part) == bits.shape for part, bits in parts.items()):
            found[name] = {part: SparseMask(bits.bool()) for part, bits in parts.items()}
    return found


def masks_as_loaded(model: Any, stored: Mapping[str, SparseMask], names: Iterable[str]) -> dict[str, SparseMask]:
    """The other way: masks by the names of a file as masks of a loaded model's weights.

    A weight of which only some parts have masks keeps the others whole.

    Args:
        model: From ``from_pretrained``.
        stored: By the names of the file.
        names: Parameters that may be meant. One that is stored under its own name is no part of the result.

    Raises:
        ValueError: If a mask has another shape than what it belongs to.
    """
    parameters = dict(model.named_parameters())
    found = {}
    for name in names:
        shape = parameters[name].shape
        places = parts_in_file(model, {name: torch.empty(shape, device="meta")})  # first, what they are called
        if name in places or not any(part in stored for part in places):
            continue
        kind = torch.int32 if shape.numel() < 2**31 else torch.int64
        places = parts_in_file(model, {name: torch.arange(shape.numel(), dtype=kind).view(shape)})
        mask = torch.ones(shape.numel(), dtype=torch.bool)
        for part, where in places.items():
            if part in stored:
                if stored[part].shape != where.shape:
                    raise ValueError(
                        f"the mask {part!r} has shape {tuple(stored[part].shape)}, the weight has "
                        f"{tuple(where.shape)}; the masks are of another model"
                    )
                mask[where.reshape(-1).long()] = stored[part].mask.reshape(-1)
        found[name] = SparseMask(mask.view(shape))
    return found
