"""The state of a model in training, in one safetensors file: modes, masks, codes and θ with it."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from resu.core.io import FileFormatError, naming, replacing
from resu.core.mask_files import write_safetensors
from resu.core.sharding import local, whole

__all__ = ["STATE_FILE", "read_state", "write_state"]

STATE_FILE = "model.safetensors"


def write_state(model: nn.Module, folder: Path, *, writes: bool = True) -> None:
    """Write ``model.state_dict()``; a tensor that has several names is written once.

    Args:
        model: Where it is sharded, every process must call this, for parameters are gathered one by one.
        folder: Where to.
        writes: Whether this process is the one that writes.
    """
    state = model.state_dict()
    first = _first_names(state)
    kept: dict[str, Tensor] = {}
    for name, value in state.items():
        full = whole(value.detach())
        if writes and first[name] == name:
            kept[name] = full.cpu().contiguous()
    if not writes:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / STATE_FILE, overwrite=True) as temporary:
        write_safetensors(kept, temporary, {"format": "pt"})


def read_state(model: nn.Module, folder: Path) -> None:
    """Load what :func:`write_state` wrote into a model that was made ready alike.

    Raises:
        FileNotFoundError: If the file is not there.
        FileFormatError: If it is damaged or of another model; names are listed.
    """
    file = folder / STATE_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no {file}: the checkpoint is not whole; remove {folder} to go on from before"
        )
    try:
        with naming(file):
            state = load_file(file)
    except Exception as error:  # safetensors has an error of its own kind
        if isinstance(error, OSError):
            raise
        raise FileFormatError(f"{file} is damaged: {error}") from None
    first = _first_names(model.state_dict())
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise FileFormatError(f"{file} is of another model: {error}") from None
    # What has several names is in the file under the first of them.
    lost = [name for name in result.missing_keys if first.get(name, name) not in state]
    if lost or result.unexpected_keys:
        odd = ", ".join([*lost, *result.unexpected_keys][:5])
        raise FileFormatError(f"{file} is of another model: it lacks or adds {odd}")


def _first_names(state: dict[str, Tensor]) -> dict[str, str]:
    """Each name and the first one of the same tensor."""
    seen: dict[tuple[object, ...], str] = {}
    found: dict[str, str] = {}
    for name, value in state.items():
        here = local(value)
        place = (name,) if not here.numel() else (here.data_ptr(), value.shape, value.stride(), value.dtype)
        found[name] = seen.setdefault(place, name)
    return found
