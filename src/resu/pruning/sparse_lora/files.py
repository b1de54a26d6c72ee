"""One adapter in one safetensors file: factors, masks, what trained beside it, and its settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

import resu
from resu.core.io import FileFormatError, open_header, replacing, seal_header, tensor_checksum
from resu.core.mask_files import checked_masks, mask_entries, write_safetensors
from resu.pruning.sparse_lora.adapters import adapter_state_dict, load_adapter_state_dict
from resu.pruning.sparse_lora.apply import apply_sparse_lora, get_lora_layers
from resu.pruning.sparse_lora.config import SparseLoRAConfig

__all__ = ["load_adapter", "save_adapter"]

_HEADER = "resu_sparse_lora"
_VERSION = 1
_BITS = ".bitmask"


def save_adapter(
    model: nn.Module, path: str | os.PathLike[str], adapter: str = "default", *, overwrite: bool = False
) -> None:
    """Write what one adapter needs beside the pruned model it was made for; all or nothing.

    Tensors: those of :func:`resu.pruning.sparse_lora.adapters.adapter_state_dict`, and ``NAME.bitmask`` with the mask
    of each adapted weight (a bit per weight). The header has the settings, and a checksum of each tensor.

    Args:
        model: With adapters, merged or not.
        path: Where; ``.safetensors`` by custom.
        adapter: Its name.
        overwrite: Whether a file that is there may be replaced.

    Raises:
        ValueError: If there is no such adapter.
        FileExistsError: If there is a file and ``overwrite`` is False.
        OSError: If it cannot be written; what was there before is whole.
    """
    state = {name: tensor.cpu().contiguous() for name, tensor in adapter_state_dict(model, adapter).items()}
    layers = {name: layer for name, layer in get_lora_layers(model).items() if adapter in layer.configs}
    masks = {name: layer.mask for name, layer in layers.items()}
    header = seal_header(
        _HEADER,
        {
            "version": _VERSION,
            "library": resu.__version__,
            "adapter": adapter,
            "config": asdict(next(iter(layers.values())).configs[adapter]),
            "masks": mask_entries(masks),
            "tensors": {name: tensor_checksum(tensor) for name, tensor in state.items()},
        },
    )
    bits = {name + _BITS: mask.packed.cpu().contiguous() for name, mask in masks.items()}
    with replacing(path, overwrite=overwrite) as temporary:
        write_safetensors(state | bits, temporary, header)


def load_adapter(model: nn.Module, path: str | os.PathLike[str], adapter: str | None = None) -> nn.Module:
    """Put a saved adapter on a model, by :func:`resu.pruning.sparse_lora.apply.apply_sparse_lora` with its masks.

    Args:
        model: The model it was made for, plain or with other adapters on the same masks. Weights are masked as the file
            says; with ``base_bits`` they are quantized anew, to the same codes if they are the same weights.
        path: What :func:`save_adapter` wrote.
        adapter: Its name here; the one it was saved under by default.

    Returns:
        The model, with the adapter acting.

    Raises:
        FileNotFoundError: If there is no such file.
        FileFormatError: If it is damaged, or something else; the model is unchanged.
        ValueError: If it does not fit the model.

    Example:
        >>> import tempfile, torch
        >>> model = apply_sparse_lora(nn.Sequential(nn.Linear(8, 8)), None, SparseLoRAConfig(r=2))
        >>> fresh = nn.Sequential(nn.Linear(8, 8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(model, f"{folder}/a.safetensors")
        ...     fresh = load_adapter(fresh, f"{folder}/a.safetensors")
        >>> torch.equal(fresh[0].lora_A["default"], model[0].lora_A["default"])
        True
    """
    tensors, body = _read(path)
    packed = {name.removesuffix(_BITS): t for name, t in tensors.items() if name.endswith(_BITS)}
    masks = checked_masks(packed, body["masks"], path)
    state = {name: t for name, t in tensors.items() if not name.endswith(_BITS)}
    if set(state) != set(body["tensors"]):
        odd = ", ".join(sorted(set(state) ^ set(body["tensors"])))
        raise FileFormatError(f"{path}: tensors and header disagree about {odd}")
    for name, tensor in state.items():
        if tensor_checksum(tensor) != body["tensors"][name]:
            raise FileFormatError(f"{path}: {name!r} does not match its checksum: the file is damaged")
    try:
        config = SparseLoRAConfig(**body["config"])
    except (TypeError, ValueError) as error:
        raise FileFormatError(f"{path}: its settings cannot be read by this version of resu: {error}") from None
    name = body["adapter"] if adapter is None else adapter
    model = apply_sparse_lora(model, masks, config, name)
    load_adapter_state_dict(model, state, name)
    return model


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            given = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # whatever a parser makes of damaged bytes: to the user it is one thing
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileFormatError(f"cannot read {path} as an adapter: {reason}") from error
    return tensors, open_header(_HEADER, given, _VERSION, path)
