"""The bitmask layout: kept values and one bit per weight.

It is the layout that compressed-tensors up to 0.14 wrote as ``sparse-bitmask`` (and ``sparse-24-bitmask``), so that
checkpoints of that kind stay readable. For a weight ``P.weight``, which itself is absent: ``P.shape`` int64,
``P.compressed`` the kept values in row-major order, ``P.bitmask`` uint8 ``[rows, ceil(columns / 8)]``, and
``P.row_offsets`` int64 ``[rows]``, where each row starts in ``P.compressed``. Unlike there, the mask comes from the
mask: a kept weight that is 0 stays kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from resu.core.io import FileFormatError
from resu.core.mask import SparseMask

__all__ = ["bitmask_prefixes", "pack_bitmask", "unpack_bitmask"]

_PARTS = ("shape", "compressed", "bitmask", "row_offsets")


def _offsets(mask: SparseMask) -> Tensor:
    kept = mask.mask.view(mask.packed.shape[0], -1).sum(dim=1)
    return kept.cumsum(0) - kept


def pack_bitmask(weight: Tensor, mask: SparseMask) -> dict[str, Tensor]:
    """The parts of a weight, without its prefix.

    Args:
        weight: ``[rows, …]``; values at pruned positions are not stored.
        mask: Of the weight's shape.

    Returns:
        ``shape, compressed, bitmask, row_offsets``.

    Example:
        >>> parts = pack_bitmask(torch.tensor([[0.0, 7.0], [0.0, 0.0]]), SparseMask(torch.tensor([[True, True],
        ...                                                                                       [False, False]])))
        >>> parts["compressed"], parts["row_offsets"]
        (tensor([0., 7.]), tensor([0, 2]))
    """
    return {
        "shape": torch.tensor(weight.shape, dtype=torch.int64),
        "compressed": mask.get_active(weight.detach()).contiguous(),
        "bitmask": mask.packed,
        "row_offsets": _offsets(mask),
    }


def unpack_bitmask(parts: Mapping[str, Tensor], name: str = "weight") -> tuple[Tensor, SparseMask]:
    """Inverse of :func:`pack_bitmask`; ``row_offsets`` may be absent (``sparse-24-bitmask``).

    Args:
        parts: By part name, without prefix.
        name: What to call the weight in errors.

    Raises:
        FileFormatError: If the parts do not fit together.
    """
    try:
        shape = torch.Size(int(d) for d in parts["shape"].reshape(-1).tolist())
        values = parts["compressed"].reshape(-1)
        mask = SparseMask.from_packed(parts["bitmask"], shape)
    except (KeyError, ValueError, RuntimeError) as error:
        raise FileFormatError(f"{name!r} in bitmask layout is damaged: {error}") from None
    if values.numel() != mask.n_active:
        raise FileFormatError(f"{name!r} holds {values.numel()} values, its bitmask {mask.n_active} ones")
    offsets = parts.get("row_offsets")
    if offsets is not None and not torch.equal(offsets.reshape(-1), _offsets(mask)):
        raise FileFormatError(f"the row offsets of {name!r} do not fit its bitmask")
    weight = values.new_zeros(shape).masked_scatter_(mask.mask, values)
    return weight, mask


def bitmask_prefixes(names: Mapping[str, object]) -> list[str]:
    """Prefixes ``P`` (with their dot) of all weights in bitmask layout among the tensor names."""
    found = [name.removesuffix("compressed") for name in names if name.split(".")[-1] == "compressed"]
    return [p for p in found if f"{p}bitmask" in names and f"{p}shape" in names]


def take_bitmask(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove the parts under ``prefix`` from ``tensors`` and return them."""
    return {part: tensors.pop(prefix + part) for part in _PARTS if prefix + part in tensors}
