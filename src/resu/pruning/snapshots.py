"""A model as it was, in memory or in a file, and the random state beside it."""

from __future__ import annotations

import base64
import hashlib
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from resu.core.io import FileFormatError, replacing, tensor_checksum
from resu.core.mask_files import write_safetensors

__all__ = ["model_checksum", "random_state", "read_model", "set_random_state", "take_snapshot", "write_model"]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    state: Mapping[str, Any] = model.state_dict()
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise TypeError(
            f"the model's state_dict holds {', '.join(odd[:5])}, which is no tensor and fits in no safetensors file"
        )
    return dict(state)


def model_checksum(model: nn.Module) -> str:
    """SHA-256 (hex) over names, shapes, dtypes and bytes of all parameters and buffers.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> before = model_checksum(model)
        >>> with torch.no_grad():
        ...     _ = model.weight.mul_(2)
        >>> model_checksum(model) == before
        False
    """
    digest = hashlib.sha256()
    for name, value in sorted(_tensors(model).items()):
        digest.update(f"{name} {tensor_checksum(value)}\n".encode())
    return digest.hexdigest()


def take_snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state, for ``model.load_state_dict``."""
    return {name: value.detach().clone() for name, value in _tensors(model).items()}


def write_model(model: nn.Module, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """The state_dict as safetensors, atomically. A tensor with several names is stored once.

    Raises:
        FileExistsError: If the file is there and ``overwrite`` is False.
        OSError: If it cannot be written; what was there before is whole.
    """
    state, stored = _tensors(model), {}
    first: dict[Any, str] = {}
    ties: dict[str, str] = {}
    for name, value in state.items():
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else name
        if key in first:
            ties[name] = first[key]
        else:
            first[key] = name
            # Copied, so that views into one storage are tensors of their own to the format.
            stored[name] = value.detach().cpu().contiguous().clone()
    header = {"format": "pt", **{f"tie:{name}": owner for name, owner in ties.items()}}
    with replacing(path, overwrite=overwrite) as temporary:
        write_safetensors(stored, temporary, header)


def read_model(model: nn.Module, path: str | os.PathLike[str], checksum: str) -> None:
    """Put the state of a file that :func:`write_model` wrote into ``model``, in place.

    Raises:
        FileNotFoundError: If there is no such file.
        FileFormatError: If it is damaged, of another model, or not what ``checksum`` says.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        stored = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise FileFormatError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    present = _tensors(model)
    owners: dict[Any, str] = {}
    for name, value in present.items():  # ties are those of the model
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else name
        owner = owners.setdefault(key, name)
        if name not in stored and owner in stored:
            stored[name] = stored[owner]
    digest = hashlib.sha256()
    for name, value in sorted(stored.items()):
        digest.update(f"{name} {tensor_checksum(value)}\n".encode())
    if digest.hexdigest() != checksum:
        raise FileFormatError(f"{path} does not match its checksum: it is damaged, or of another model")
    model.load_state_dict(stored)


def random_state() -> dict[str, Any]:
    """The state of Python's, numpy's and torch's global generators, as plain JSON."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss_next],
        "numpy": [kind, _text(np.asarray(keys).tobytes()), int(position), int(has_gauss), float(gauss)],
        "torch": _text(torch.get_rng_state().numpy().tobytes()),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = [_text(x.cpu().numpy().tobytes()) for x in torch.cuda.get_rng_state_all()]
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Inverse of :func:`random_state`; generators of GPUs that are not there are left out."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.frombuffer(base64.b64decode(keys), dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(_bytes(state["torch"]))
    for index, text in enumerate(state.get("cuda", ())):
        if torch.cuda.is_available() and index < torch.cuda.device_count():
            torch.cuda.set_rng_state(_bytes(text), index)


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
