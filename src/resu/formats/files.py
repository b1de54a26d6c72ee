"""Checkpoints: a model's state, its masks and whatever belongs to a run, in one safetensors file."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

import resu
from resu.core.io import FileFormatError, open_header, replacing, seal_header, tensor_checksum, user_metadata
from resu.core.mask import SparseMask
from resu.core.mask_files import checked_masks, mask_entries, write_safetensors
from resu.formats.bitmask import bitmask_prefixes, pack_bitmask, take_bitmask, unpack_bitmask
from resu.formats.checks import nonzero_pruned
from resu.formats.tree import flatten, unflatten

__all__ = ["CHECKPOINT_HEADER", "Checkpoint", "load_checkpoint", "read_safetensors", "save_checkpoint"]

CHECKPOINT_HEADER = "resu_checkpoint"
MASK_PREFIX = "resu.mask."
EXTRA_PREFIX = "resu.extra."
MODE_SETTINGS = "resu_settings"  # a state_dict entry of layers that are in a mode of their own
VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        state: ``state_dict`` of the model; weights in bitmask layout are dense again, ties are one tensor.
        masks: ``{parameter name: SparseMask}``.
        metadata: The user's own.
        extra: Nested states saved beside the model, by name.
    """

    state: dict[str, Tensor]
    masks: dict[str, SparseMask] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    model: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    masks: Mapping[str, Tensor | SparseMask] | None = None,
    extra: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    layout: str = "dense",
    overwrite: bool = False,
) -> None:
    """Save a model, in any mode, with its masks: one safetensors file, all or nothing.

    Weights are dense with exact zeros, which anything that reads safetensors can load, or in the bitmask layout
    (kept values and one bit per weight). Tensors that are tied are stored once.

    Args:
        model: A module, or its ``state_dict``.
        path: Where.
        masks: ``{parameter name: mask}``.
        extra: Nested states by name, e.g. ``{"optimizer": optimizer.state_dict()}``.
        metadata: Plain JSON of your own.
        layout: ``"dense"`` or ``"bitmask"`` (for weights that have a mask).
        overwrite: Whether a file that is there may be replaced.

    Raises:
        FileExistsError: If there is a file and ``overwrite`` is False.
        ValueError: If a mask fits no weight, or a weight is not zero where its mask prunes.
        TypeError: If a state holds what cannot be stored without a pickle.
        OSError: If the file cannot be written; what was there before is whole.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(4, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(model, f"{folder}/model.safetensors", metadata={"epoch": 3})
        ...     load_checkpoint(f"{folder}/model.safetensors", model).metadata
        {'epoch': 3}
    """
    if layout not in ("dense", "bitmask"):
        raise ValueError(f"layout must be 'dense' or 'bitmask', got {layout!r}")
    tensors, ties = plain_tensors(model.state_dict() if isinstance(model, nn.Module) else model)
    packed = {n: m if isinstance(m, SparseMask) else SparseMask(m) for n, m in (masks or {}).items()}
    for name, mask in packed.items():
        owner = ties.get(name, name)
        if any(f"{owner.rpartition('.')[0]}.{MODE_SETTINGS}".lstrip(".") == key for key in tensors):
            continue  # the layer keeps its own mask and, at pruned positions, θ
        check_masked(name, tensors.get(owner), mask)
        if layout == "bitmask" and owner in tensors and owner.split(".")[-1] == "weight":
            prefix = owner.removesuffix("weight")
            parts = pack_bitmask(tensors.pop(owner), mask)
            tensors |= {prefix + part: value for part, value in parts.items()}
    tensors |= {MASK_PREFIX + name: mask.packed for name, mask in packed.items()}
    states: dict[str, Tensor] = {}
    tree = {name: flatten(value, states, EXTRA_PREFIX + name) for name, value in (extra or {}).items()}
    tensors |= states
    tensors = separate(tensors)
    header = seal_header(
        CHECKPOINT_HEADER,
        {
            "version": VERSION,
            "library": resu.__version__,
            "masks": mask_entries(packed),
            "ties": ties,
            "extra": tree,
            "metadata": user_metadata(metadata),
            "sha256": {name: tensor_checksum(tensor) for name, tensor in tensors.items()},
        },
    )
    with replacing(path, overwrite=overwrite) as temporary:
        write_safetensors(tensors, temporary, {"format": "pt", **header})


def plain_tensors(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, each once, and ``{other name: name}`` of those that are the same."""
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"state {name!r} is a {type(value).__name__}, not a tensor; give it in extra if it is plain data"
            )
        if value.is_meta:
            raise ValueError(f"{name!r} is on the meta device and has no values to save")
        if value.layout != torch.strided:
            raise TypeError(f"{name!r} has layout {value.layout}; only dense tensors are saved")
        key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and key in seen:
            ties[name] = seen[key]
        else:
            seen[key] = name
            tensors[name] = value.detach()
    return tensors, ties


def check_masked(name: str, weight: Tensor | None, mask: SparseMask) -> None:
    if weight is None:
        raise ValueError(f"mask {name!r} belongs to no tensor of the state")
    if weight.shape != mask.shape:
        raise ValueError(f"mask {name!r} has shape {tuple(mask.shape)}, the weight {tuple(weight.shape)}")
    odd = nonzero_pruned(weight.detach(), mask.to(weight.device))
    if odd:
        raise ValueError(f"{name!r} is not zero at {odd} positions its mask prunes; apply the mask before saving")


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, each with a storage of its own: safetensors refuses views that share one."""
    result: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in taken or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        taken.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file.

    Raises:
        FileNotFoundError: If there is no such file.
        FileFormatError: If it is truncated, damaged or something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with open(path, "rb"):  # what the system has to say comes out as it is
        pass
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:
        raise FileFormatError(f"cannot read {path} as safetensors: {error}") from error


def load_checkpoint(path: str | os.PathLike[str], model: nn.Module | None = None) -> Checkpoint:
    """Read a checkpoint, verified, and load it into ``model`` if one is given.

    Any safetensors file of a whole model can be read, also without a header of ours, and with weights in
    the bitmask layout. The model must have exactly the tensors of the file (there is no non-strict loading).

    Args:
        path: The file.
        model: Takes the state; resurrection layers take up the mode they were saved in.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated or damaged (the tensor is named), or does not fit the model, which is
            then unchanged.
    """
    found = parse_checkpoint(*read_safetensors(path), path)
    if model is not None:
        _load(model, found.state, path)
    return found


def parse_checkpoint(tensors: Mapping[str, Tensor], given: Mapping[str, str], path: object) -> Checkpoint:
    """A checkpoint from what :func:`read_safetensors` found at ``path``; every tensor is verified.

    Raises:
        FileFormatError: If it is damaged (the tensor is named).
    """
    tensors = dict(tensors)
    body: dict[str, Any] = {}
    if CHECKPOINT_HEADER in given:
        body = open_header(CHECKPOINT_HEADER, given, VERSION, path)
        _verify(tensors, body["sha256"], path)
    elif any(name.startswith((MASK_PREFIX, EXTRA_PREFIX)) for name in tensors):
        open_header(CHECKPOINT_HEADER, given, VERSION, path)  # raises: it should be there
    packed = {n.removeprefix(MASK_PREFIX): tensors.pop(n) for n in list(tensors) if n.startswith(MASK_PREFIX)}
    masks = checked_masks(packed, body.get("masks", {}), path)
    states = {n: tensors.pop(n) for n in list(tensors) if n.startswith(EXTRA_PREFIX)}
    extra = {name: unflatten(tree, states) for name, tree in body.get("extra", {}).items()}
    for prefix in bitmask_prefixes(tensors):
        name = prefix + "weight"
        tensors[name], mask = unpack_bitmask(take_bitmask(tensors, prefix), name)
        if not body:  # our header knows the masks, by the names the user gave
            masks[name] = mask
    for alias, owner in body.get("ties", {}).items():
        tensors[alias] = tensors[owner]
    return Checkpoint(tensors, masks, body.get("metadata", {}), extra)


def _verify(tensors: Mapping[str, Tensor], sums: Mapping[str, str], path: object) -> None:
    if set(tensors) != set(sums):
        odd = sorted(set(tensors) ^ set(sums))
        raise FileFormatError(f"{path}: tensors and header disagree about {', '.join(map(repr, odd))}")
    for name, tensor in tensors.items():
        if tensor_checksum(tensor) != sums[name]:
            raise FileFormatError(f"{path}: tensor {name!r} does not match its checksum: the file is damaged")


def _load(model: nn.Module, state: Mapping[str, Tensor], path: object) -> None:
    before = {
        name: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)  # an extra state
        for name, value in model.state_dict().items()
    }
    try:
        model.load_state_dict(dict(state), strict=True)
    except BaseException as error:
        # What fitted has been loaded by then.
        model.load_state_dict(before, strict=True)
        if isinstance(error, RuntimeError):
            raise FileFormatError(f"{path} does not fit the model: {error}") from None
        raise
