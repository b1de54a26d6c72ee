"""The bitmask layout: kept values and one bit per weight.

It is the layout that compressed-tensors up to 0.14 wrote as ``sparse-bitmask`` and, for 2:4 masks,
``sparse-24-bitmask``, so that checkpoints of that kind stay readable. For a weight ``P.weight``, which itself is
absent: ``P.shape`` int64, ``P.compressed`` the kept values in row-major order, ``P.bitmask`` uint8 ``[rows,
ceil(columns / 8)]``, and ``P.row_offsets`` int64 ``[rows]``, where each row starts in ``P.compressed``; the 2:4 variant
has ``P.compressed`` as ``[rows, columns / 2]`` and no offsets. Unlike there, the mask comes from the mask: a kept
weight that is 0 stays kept.

A weight that is not a matrix is where the two differ: checkpoints of this library see it as ``[first dimension,
the rest]``, one row padded to a byte; compressed-tensors pads every run along the last dimension, and its bitmask has
as many dimensions as the weight. Both are read.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from resu.core.io import FileFormatError
from resu.core.mask import SparseMask, count_bits, pack_bits

__all__ = ["bitmask_prefixes", "check_24", "pack_bitmask", "pack_compressed", "unpack_bitmask"]

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PARTS = ("shape", "compressed", "bitmask", "row_offsets")


def _offsets(kept: Tensor) -> Tensor:
    return kept.cumsum(0) - kept


def _words(x: Tensor) -> Tensor:
    """8-bit floats as the integers they are stored as: torch selects few of their kinds."""
    return x.view(torch.uint8) if x.is_floating_point() and x.element_size() == 1 else x


def _kept(weight: Tensor, mask: SparseMask) -> Tensor:
    """The values at kept positions, bit for bit."""
    if weight.shape != mask.shape:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} has a mask of shape {tuple(mask.shape)}")
    words = weight.view(_WORDS[weight.element_size()]) if weight.element_size() in _WORDS else weight
    if weight.device.type != "cpu":
        return mask.get_active(words).contiguous().view(weight.dtype)
    # Faster than masked_select.
    taken = words.reshape(-1).numpy().take(np.flatnonzero(mask.mask.numpy()))
    return torch.from_numpy(taken).view(weight.dtype)


def pack_bitmask(weight: Tensor, mask: SparseMask) -> dict[str, Tensor]:
    """The parts of a weight, without its prefix, as checkpoints of this library hold them.

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
        "compressed": _kept(weight.detach(), mask),
        "bitmask": mask.packed,
        "row_offsets": _offsets(count_bits(mask.packed)),
    }


def pack_compressed(weight: Tensor, mask: SparseMask, layout: str = "sparse-bitmask") -> dict[str, Tensor]:
    """The parts of a weight, without its prefix, as compressed-tensors 0.14 reads them.

    Args:
        weight: Any shape of at least one dimension; a matrix for ``"sparse-24-bitmask"``.
        mask: Of the weight's shape.
        layout: ``"sparse-bitmask"`` or ``"sparse-24-bitmask"``.

    Returns:
        ``shape, compressed, bitmask`` and, for the first layout, ``row_offsets``.

    Raises:
        ValueError: If the layout is not known, or a mask does not keep exactly 2 of each 4 in ``sparse-24-bitmask``.

    Example:
        >>> keep = torch.tensor([[True, False, False, True]])
        >>> pack_compressed(torch.tensor([[5.0, 0.0, 0.0, 0.0]]), SparseMask(keep), "sparse-24-bitmask")["compressed"]
        tensor([[5., 0.]])
    """
    parts = pack_bitmask(weight, mask)
    shape = weight.shape
    if layout == "sparse-24-bitmask":
        check_24(mask)
        return {
            "shape": parts["shape"].view(-1, 1),
            "compressed": parts["compressed"].view(shape[0], shape[1] // 2),
            "bitmask": parts["bitmask"],
        }
    if layout != "sparse-bitmask":
        raise ValueError(f"layout {layout!r} is not known; known: sparse-bitmask, sparse-24-bitmask")
    if not shape:
        raise ValueError("a single number has no rows and is not stored in the bitmask layout")
    if len(shape) != 2:
        bits = pack_bits(mask.mask.view(shape[:-1].numel(), shape[-1]))
        parts["bitmask"] = bits.view(*shape[:-1], bits.shape[-1])
        parts["row_offsets"] = _offsets(count_bits(parts["bitmask"]))
    return parts


def check_24(mask: SparseMask) -> None:
    """A mask keeps exactly 2 of each 4 neighbours in every row.

    Raises:
        ValueError: If it does not; it says how many groups break the rule.
    """
    shape = tuple(mask.shape)
    if len(shape) != 2 or shape[1] % 4:
        raise ValueError(f"2:4 needs a matrix with columns in fours, got shape {shape}")
    odd = int((mask.mask.view(-1, 4).sum(dim=1) != 2).sum())
    if odd:
        raise ValueError(f"{odd} of {mask.numel // 4} groups of 4 do not keep exactly 2")


def unpack_bitmask(parts: Mapping[str, Tensor], name: str = "weight") -> tuple[Tensor, SparseMask]:
    """Inverse of :func:`pack_bitmask` and :func:`pack_compressed`; ``row_offsets`` may be absent.

    Args:
        parts: By part name, without prefix.
        name: What to call the weight in errors.

    Raises:
        FileFormatError: If the parts do not fit together.
    """
    try:
        shape = torch.Size(int(d) for d in parts["shape"].reshape(-1).tolist())
        values = parts["compressed"].reshape(-1)
        mask, kept = mask_from_bits(parts["bitmask"], shape)
    except (KeyError, ValueError, RuntimeError, OverflowError) as error:
        raise FileFormatError(f"{name!r} in bitmask layout is damaged: {error}") from None
    if values.numel() != mask.n_active:
        raise FileFormatError(f"{name!r} holds {values.numel()} values, its bitmask {mask.n_active} ones")
    offsets = parts.get("row_offsets")
    if offsets is not None and not torch.equal(offsets.to(torch.int64), _offsets(kept)):
        raise FileFormatError(f"the row offsets of {name!r} do not fit its bitmask")
    weight = _words(values).new_zeros(shape).masked_scatter_(mask.mask, _words(values))
    return weight.view(values.dtype), mask


def mask_from_bits(bits: Tensor, shape: torch.Size) -> tuple[SparseMask, Tensor]:
    """The mask, and how many are kept in each row of the file's own kind."""
    if bits.ndim == len(shape) != 2 and bits.ndim > 0:
        rows, columns = shape[:-1].numel(), shape[-1]
        if bits.shape[:-1] != shape[:-1]:
            raise ValueError(f"bitmask of shape {tuple(bits.shape)} for a weight of shape {tuple(shape)}")
        # Checked as a matrix, padding bits included, then seen in the weight's shape.
        flat = SparseMask.from_packed(bits.reshape(rows, bits.shape[-1]), (rows, columns))
        return SparseMask(flat.mask.view(shape)), count_bits(bits)
    return SparseMask.from_packed(bits, shape), count_bits(bits)


def bitmask_prefixes(names: Mapping[str, object]) -> list[str]:
    """Prefixes ``P`` (with their dot) of all weights in bitmask layout among the tensor names."""
    found = [name.removesuffix("compressed") for name in names if name.split(".")[-1] == "compressed"]
    return [p for p in found if f"{p}bitmask" in names and f"{p}shape" in names]


def take_bitmask(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove the parts under ``prefix`` from ``tensors`` and return them."""
    return {part: tensors.pop(prefix + part) for part in PARTS if prefix + part in tensors}
