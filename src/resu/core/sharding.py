"""Weights that lie on one device, or in parts on many (``DTensor``, as FSDP2 makes them): one way to handle both.

A mask, θ and the state of an optimizer lie where their weight lies. So everything that acts at single positions works
on the part that is here (:func:`local`), and only a choice among all positions gathers (:func:`whole`).
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_layout", "is_sharded", "largest_part", "local", "part_of", "shard_beside", "shard_like", "whole"]


def is_sharded(x: Any) -> bool:
    """Whether ``x`` is a ``DTensor``; costs nothing where no distributed tensor was ever made."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def check_layout(name: str, weight: Tensor) -> None:
    """Raise ``ValueError`` if a weight is sharded in a way that masks, packed row by row, cannot follow."""
    if is_sharded(weight) and any(p.is_shard() and not p.is_shard(0) for p in weight.placements):  # type: ignore[attr-defined]
        raise ValueError(
            f"{name!r} is sharded as {weight.placements}, and masks follow rows only; shard its first dimension "  # type: ignore[attr-defined]
            "(what fully_shard does by itself), or exclude it"
        )


@torch.no_grad()
def local(x: Tensor) -> Tensor:
    """The part of ``x`` that lies on this rank, sharing its memory; ``x`` itself if it is a plain tensor."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


@torch.no_grad()
def whole(x: Tensor) -> Tensor:
    """All of ``x``: gathered from all ranks (every one of them must call) if it is sharded, else ``x`` itself."""
    return x.detach().full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]


@torch.no_grad()
def part_of(full: Tensor, like: Tensor) -> Tensor:
    """Of a tensor that every rank has in full, the part that belongs where the local part of ``like`` lies."""
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    # src_data_rank=None: everybody has it already, so nothing is sent.
    placed = distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]
    return placed.to_local()


@torch.no_grad()
def shard_like(part: Tensor, like: Tensor) -> Tensor:
    """A ``DTensor`` of local parts with as many rows as ``like`` and its layout; ``part`` itself if ``like`` is plain.

    Args:
        part: This rank's rows, ``[local rows, …]``; what follows the first dimension may differ from ``like``.
        like: Sharded over its first dimension at most.
    """
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    shape = torch.Size([like.shape[0], *part.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part,
        like.device_mesh,  # type: ignore[attr-defined]
        like.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=shape,
        stride=stride,
    )


@torch.no_grad()
def shard_beside(part: Tensor, like: Tensor) -> Tensor:
    """A ``DTensor`` of equally many values ``[n]`` from each rank, laid out as ``like``; ``part`` if that is plain.

    For what belongs to local parts and has no rows of its own, such as a scale for each block of a flattened part. A
    checkpoint of it fits the same number of ranks only.
    """
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    shape = torch.Size([part.numel() * _parts(like)])
    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=(1,))


def largest_part(like: Tensor) -> int:
    """How many values the rank with the most of them has of ``like``, sharded over its first dimension at most."""
    if not is_sharded(like):
        return like.numel()
    return -(-like.shape[0] // _parts(like)) * like.shape[1:].numel()


def _parts(x: Any) -> int:
    """Into how many parts the mesh divides a ``DTensor``; replicas of one count once."""
    return math.prod(x.device_mesh.size(axis) for axis, p in enumerate(x.placements) if p.is_shard())
