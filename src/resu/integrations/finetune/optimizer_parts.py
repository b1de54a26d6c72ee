"""The optimizer state of one of several processes that share a model, in a file of its own.

Under FSDP2 each process holds the state of its part of the parameters. It is written as plain tensors, with what is
needed to make distributed ones of them again, so that nothing but tensors and plain values is ever read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from resu.core.io import replacing
from resu.core.sharding import is_sharded, local

__all__ = ["read_part", "write_part"]

_WHOLE = -1  # in place of a dimension: not sharded


def write_part(optimizer: Optimizer, folder: Path, rank: int, world: int) -> None:
    """Write what ``optimizer`` holds here as ``optimizer_RANK.pt``, which ``torch.load(weights_only=True)`` reads."""
    held = optimizer.state_dict()
    plain: dict[int, dict[str, Any]] = {}
    layouts: dict[int, dict[str, tuple[list[int], list[int]]]] = {}
    for index, values in held["state"].items():
        plain[index] = {name: local(v) if isinstance(v, Tensor) else v for name, v in values.items()}
        layouts[index] = {name: _layout(v) for name, v in values.items() if is_sharded(v)}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(_file(folder, rank), overwrite=True) as temporary:
        content = {"state": plain, "layouts": layouts, "param_groups": held["param_groups"], "processes": world}
        torch.save(content, temporary)


def read_part(optimizer: Optimizer, folder: Path, rank: int, world: int) -> None:
    """Load what :func:`write_part` wrote into an optimizer over the same parts.

    Raises:
        FileNotFoundError: If the file is not there.
        ValueError: If it was written by another number of processes.
    """
    file = _file(folder, rank)
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}: go on with as many processes as before, divided as before")
    found = torch.load(file, map_location="cpu", weights_only=True)
    if found["processes"] != world:
        raise ValueError(
            f"{folder} was written by {found['processes']} processes, there are {world}; go on with as many as before"
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = found["state"]
    for index, values in found["layouts"].items():
        for name, layout in values.items():
            state[index][name] = _distributed(state[index][name], parameters[index], *layout)
    optimizer.load_state_dict({"state": state, "param_groups": found["param_groups"]})


def _file(folder: Path, rank: int) -> Path:
    return folder / f"optimizer_{rank}.pt"


def _layout(value: Any) -> tuple[list[int], list[int]]:
    """Shape of the whole, and by which dimension each axis of the mesh divides it."""
    return list(value.shape), [p.dim if p.is_shard() else _WHOLE for p in value.placements]


def _distributed(part: Tensor, like: Any, shape: list[int], dims: list[int]) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    stride = torch.empty(shape, device="meta").stride()
    placements = [Replicate() if dim == _WHOLE else Shard(dim) for dim in dims]
    here = part.to(like.device)
    return DTensor.from_local(
        here, like.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
