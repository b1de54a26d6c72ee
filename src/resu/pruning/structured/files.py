"""A smaller model in a folder: its tensors as safetensors, and a manifest that makes the original class as small."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resu.core.io import FileFormatError, open_header, replacing, seal_header
from resu.pruning.snapshots import model_checksum, read_model, write_model
from resu.pruning.structured.attributes import recomputed, set_attribute
from resu.pruning.structured.blocks import remove_blocks, skipped
from resu.pruning.structured.slots import Slot, slots

__all__ = ["MANIFEST", "load_shrunk", "save_shrunk"]

MANIFEST = "shrunk.json"
_WEIGHTS = "model.safetensors"
_KEY = "resu_shrunk"
_VERSION = 1


def save_shrunk(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    kept: Mapping[str, Mapping[int, Tensor]] | None = None,
    overwrite: bool = False,
) -> None:
    """Save a model that was made smaller, so that :func:`load_shrunk` makes it from its original class.

    ``shrunk.json`` holds the shape of every tensor, and of every module the whole numbers (and tuples of them) that it
    keeps as attributes; ``model.safetensors`` the tensors, tied ones once. Both are checksummed, none is a pickle.

    Args:
        model: The smaller model, after any number of removals.
        folder: Made if it is not there.
        kept: ``result.slices``, to note down which indices of the original are left (of the last removal).
        overwrite: Whether a model that is there may be replaced.

    Raises:
        FileExistsError: If there is one and ``overwrite`` is False.
        TypeError: If the model's state holds what is no tensor.
        OSError: If it cannot be written.

    Example:
        >>> import tempfile
        >>> from resu.pruning.structured.pruner import StructuredPruner
        >>> make = lambda: nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> model = make()
        >>> _ = StructuredPruner(0.5, torch.zeros(1, 4)).prune(model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_shrunk(model, folder)
        ...     again = load_shrunk(make, folder)
        >>> again[0], bool((again[2].weight == model[2].weight).all())
        (Linear(in_features=4, out_features=8, bias=True), True)
    """
    model = _written(model)
    target = Path(folder)
    for name in (MANIFEST, _WEIGHTS):
        if (target / name).exists() and not overwrite:
            raise FileExistsError(f"{target / name} is there already; pass overwrite=True to replace it")
    body = {
        "version": _VERSION,
        "checksum": model_checksum(model),
        "skipped": skipped(model),
        "shapes": {name: list(slot.tensor.shape) for name, slot in slots(model).items()},
        "attributes": {name: found for name, module in model.named_modules() if (found := _sizes(module))},
        "kept": {
            name: {str(dim): indices.tolist() for dim, indices in dims.items()} for name, dims in (kept or {}).items()
        },
    }
    target.mkdir(parents=True, exist_ok=True)
    write_model(model, target / _WEIGHTS, overwrite=overwrite)
    # Last: a manifest is there only beside the tensors that it is of, and its checksum says so.
    with replacing(target / MANIFEST, overwrite=overwrite) as temporary:
        temporary.write_text(json.dumps(seal_header(_KEY, body), indent=1), encoding="utf-8")


def load_shrunk(model: nn.Module | Callable[[], nn.Module], folder: str | os.PathLike[str]) -> nn.Module:
    """A smaller model from its folder.

    Args:
        model: The model in its original size, or what makes it; it is made smaller in place. Ties are its own.
        folder: From :func:`save_shrunk`.

    Returns:
        The model, with the tensors of the folder.

    Raises:
        FileNotFoundError: If there is no such model.
        FileFormatError: If it is damaged, or of another class; the model given is unchanged then.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"there is no smaller model in {folder}: it has no {MANIFEST}")
    try:
        sealed = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(f"cannot read {path} as JSON: {error}") from error
    if not isinstance(sealed, dict):
        raise FileFormatError(f"{path} is no manifest of a smaller model")
    body = open_header(_KEY, sealed, _VERSION, path)
    if not isinstance(model, nn.Module):
        model = model()
    whole = _written(model)
    gone = body.get("skipped", [])
    if unknown := sorted(set(gone) - {name for name, _ in whole.named_modules()}):
        raise FileFormatError(
            f"{path} is of another model: this one has no block {unknown[0]!r} that was removed there"
        )
    back: list[Callable[[], None]] = [remove_blocks(whole, gone).undo]
    try:
        _fill(whole, path, body, back)
    except BaseException:
        for undo in reversed(back):
            undo()
        raise
    return model


def _fill(model: nn.Module, path: Path, body: Mapping[str, Any], back: list[Callable[[], None]]) -> None:
    """Sizes, attributes and tensors of the folder; ``back`` grows by what leads back."""
    found = slots(model)
    if set(found) != set(body["shapes"]):
        odd = sorted(set(found) ^ set(body["shapes"]))
        raise FileFormatError(f"{path} is of another model: they disagree about {', '.join(map(repr, odd[:5]))}")
    for name, slot in found.items():
        shape = body["shapes"][name]
        if len(shape) != slot.tensor.ndim or any(a > b for a, b in zip(shape, slot.tensor.shape, strict=True)):
            raise FileFormatError(
                f"{path}: {name!r} is {shape}, which is no part of the model's {list(slot.tensor.shape)}"
            )
    _resize(found, body["shapes"], back)
    for module_name, values in body["attributes"].items():
        module = model.get_submodule(module_name)
        for attribute, value in values.items():
            now = vars(module).get(attribute)
            value = tuple(value) if isinstance(value, list) else value
            if now is not None and type(now) is type(value) and now != value:
                back.append(set_attribute(module, attribute, value))
    read_model(model, path.parent / _WEIGHTS, body["checksum"])
    for module in model.modules():
        back.extend(recomputed(module))


def _written(model: nn.Module) -> nn.Module:
    """A model as its class is written: without what ``torch.compile`` puts around it, and in front of all names."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def _sizes(module: nn.Module) -> dict[str, Any]:
    """Whole numbers, and tuples of them, among a module's attributes."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(module).items()
        if type(value) is int or (type(value) is tuple and value and all(type(x) is int for x in value))
    }


def _resize(found: Mapping[str, Slot], shapes: Mapping[str, list[int]], back: list[Callable[[], None]]) -> None:
    new: dict[int, Tensor] = {}
    for name, slot in found.items():
        old = slot.tensor
        if list(old.shape) == shapes[name]:
            continue
        if id(old) not in new:
            value = torch.empty(shapes[name], dtype=old.dtype, device=old.device)
            new[id(old)] = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
        slot.put(new[id(old)])
        back.append(lambda slot=slot, old=old: slot.put(old))  # type: ignore[misc]
