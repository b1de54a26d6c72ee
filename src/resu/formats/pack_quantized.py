"""The layout ``pack-quantized`` of compressed-tensors: symmetric 4-bit weights, eight to an int32.

For a weight ``P.weight`` ``[out, in]``, which itself is absent: ``P.weight_packed`` int32 ``[out, ceil(in / 8)]``, in
which bits ``4i`` to ``4i + 3`` of a word hold its code ``i`` plus 8; ``P.weight_scale`` ``[out, 1]``, or
``[out, in / group_size]``, in the weight's dtype; ``P.weight_shape`` int64 ``[2]``. A weight is ``code * scale`` with
codes from -8 to 7.

A pruned weight is code 0, which is 0 exactly. A kept weight below half a step becomes 0 too, so which weights are kept
cannot be told from these files; the masks go beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from resu.core.counting import check_finite
from resu.core.io import FileFormatError
from resu.core.mask import CHUNK
from resu.core.quantization import pack_codes, unpack_codes

__all__ = [
    "FORMAT",
    "PARTS",
    "check_group_size",
    "pack_int4",
    "pack_quantized",
    "quantization_config",
    "quantized_parts",
    "quantized_prefixes",
    "unpack_int4",
    "unpack_quantized",
]

FORMAT = "pack-quantized"
PARTS = ("weight_packed", "weight_scale", "weight_shape")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_STEPS = 7.5  # half of the 15 steps between codes -8 and 7


def pack_int4(codes: Tensor) -> Tensor:
    """Codes eight to an int32, the first in the lowest bits; rows are padded with zero bits.

    Args:
        codes: int8 ``[rows, columns]`` from -8 to 7.

    Returns:
        int32 ``[rows, ceil(columns / 8)]``.

    Example:
        >>> pack_int4(torch.tensor([[-8, -7, 0]], dtype=torch.int8)).tolist() == [[0x810]]
        True
    """
    rows, columns = codes.shape
    if not rows:
        return torch.empty(0, -(-columns // 8), dtype=torch.int32, device=codes.device)
    halves = (codes + 8).to(torch.uint8)
    padded = nn.functional.pad(halves, (0, -columns % 8))
    return pack_codes(padded.reshape(-1), 4).view(torch.int32).view(rows, -(-columns // 8))


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """Inverse of :func:`pack_int4`: int8 ``[rows, columns]``.

    Example:
        >>> unpack_int4(torch.tensor([[0x810]], dtype=torch.int32), 3)
        tensor([[-8, -7,  0]], dtype=torch.int8)
    """
    rows, words = packed.shape
    halves = unpack_codes(packed.contiguous().view(torch.uint8).view(-1), 0, rows * words * 8, 4)
    return halves.view(rows, words * 8)[:, :columns].to(torch.int8) - 8


def check_group_size(group_size: int | None, columns: int) -> int:
    """Columns that share a scale: ``group_size``, or all of them where it is None.

    Raises:
        ValueError: If it is no positive integer or does not divide the columns.

    Example:
        >>> check_group_size(32, 128), check_group_size(None, 128)
        (32, 128)
    """
    if group_size is None:
        return columns
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size must be a positive integer, or None for one scale per row, got {group_size!r}")
    if columns % group_size:
        raise ValueError(f"group_size {group_size} does not divide {columns} columns; take one that does, or None")
    return group_size


def pack_quantized(weight: Tensor, group_size: int | None = None) -> dict[str, Tensor]:
    """The parts of a weight in this layout, without its prefix.

    ``scale = max |w| / 7.5`` over a row or a group, rounded up to the weight's dtype, and ``code = round(w / scale)``,
    so that ``|w - code * scale| <= scale / 2`` for every weight: half a step, 1/15 of the largest weight. A reader that
    multiplies in bfloat16 adds its own rounding, at most 1/256 of the value (1/2048 in float16). 0 stays 0.

    Args:
        weight: Floating ``[out, in]``: float64, float32, bfloat16 or float16; finite.
        group_size: Columns that share a scale; None: all of a row.

    Returns:
        ``weight_packed`` int32 ``[out, ceil(in / 8)]``, ``weight_scale`` ``[out, 1]`` or ``[out, in / group_size]`` in
        the weight's dtype (1 where all weights are 0), ``weight_shape`` int64 ``[2]``.

    Raises:
        ValueError: If it is no matrix, has no columns, holds NaN or infinite values, has another dtype, or
            ``group_size`` does not fit.

    Example:
        >>> parts = pack_quantized(torch.tensor([[7.5, 0.0, -2.0, 0.4]]))
        >>> parts["weight_scale"], unpack_quantized(parts)
        (tensor([[1.]]), tensor([[ 7.,  0., -2.,  0.]]))
    """
    if weight.ndim != 2 or weight.shape[1] == 0:
        raise ValueError(f"{FORMAT} stores matrices that have columns, got shape {tuple(weight.shape)}")
    if weight.dtype not in DTYPES:
        raise ValueError(f"{FORMAT} is made from {', '.join(map(str, DTYPES))}, got {weight.dtype}; leave it dense")
    weight = weight.detach()
    (rows, columns), size = weight.shape, check_group_size(group_size, weight.shape[1])
    codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    scale = torch.empty(rows, columns // size, dtype=weight.dtype, device=weight.device)
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):  # in float64, which nothing of the weight's size is made in
        part = slice(start, start + step)
        groups = weight[part].double().view(-1, columns // size, size)
        top = groups.abs().amax(dim=2)
        check_finite(top, "the largest weights of the rows")
        scale[part] = _scales(top, weight.dtype)
        values = groups.div(scale[part].double().unsqueeze(2)).round_().clamp_(-8, 7)
        codes[part] = values.to(torch.int8).view(-1, columns)
    return {
        "weight_packed": pack_int4(codes),
        "weight_scale": scale,
        "weight_shape": torch.tensor([rows, columns], dtype=torch.int64),
    }


def _scales(top: Tensor, dtype: torch.dtype) -> Tensor:
    """``top / 7.5`` (float64) rounded up, so that half a step reaches beyond code 7; 1 for 0."""
    scale = (top / _STEPS).to(dtype)
    # One unit in the last place more, where rounding went down.
    above = (scale.view(_WORDS[dtype.itemsize]) + 1).view(dtype)
    scale = torch.where(scale.double() * _STEPS < top, above, scale)
    return scale.masked_fill_(top == 0, 1)


def quantized_parts(
    dtype: torch.dtype, shape: tuple[int, ...], group_size: int | None
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtypes and shapes of what :func:`pack_quantized` returns for a weight of this dtype and shape."""
    rows, columns = shape
    return {
        "weight_packed": (torch.int32, (rows, -(-columns // 8))),
        "weight_scale": (dtype, (rows, columns // check_group_size(group_size, columns))),
        "weight_shape": (torch.int64, (2,)),
    }


def unpack_quantized(parts: Mapping[str, Tensor], name: str = "weight") -> Tensor:
    """The weight ``code * scale`` in the dtype of the scale: inverse of :func:`pack_quantized`.

    Args:
        parts: By part name, without prefix.
        name: What to call the weight in errors.

    Raises:
        FileFormatError: If the parts do not fit together.
    """
    try:
        packed, scale = parts["weight_packed"], parts["weight_scale"]
        rows, columns = (int(d) for d in parts["weight_shape"].reshape(-1).tolist())
    except (KeyError, ValueError) as error:
        raise FileFormatError(f"{name!r} in the layout {FORMAT} is damaged: {error}") from None
    width = -(-columns // 8)
    if columns < 1 or packed.dtype != torch.int32 or packed.shape != (rows, width):
        raise FileFormatError(
            f"{name!r} of shape {(rows, columns)} needs packed 4-bit codes int32 {(rows, width)}, found "
            f"{packed.dtype} {tuple(packed.shape)}; other numbers of bits are not read"
        )
    if scale.dtype not in DTYPES or scale.ndim != 2 or scale.shape[0] != rows or columns % max(1, scale.shape[1]):
        raise FileFormatError(f"{name!r} of shape {(rows, columns)} has scales {scale.dtype} {tuple(scale.shape)}")
    if not scale.shape[1]:
        raise FileFormatError(f"{name!r} has no scales")
    codes = unpack_int4(packed, columns).view(rows, scale.shape[1], columns // scale.shape[1])
    return codes.to(scale.dtype).mul_(scale.unsqueeze(2)).view(rows, columns)


def quantized_prefixes(names: Iterable[str]) -> list[str]:
    """Prefixes ``P`` (with their dot) of all weights in this layout among the tensor names."""
    known = set(names)
    found = [name.removesuffix("weight_packed") for name in known if name.split(".")[-1] == "weight_packed"]
    return sorted(p for p in found if all(f"{p}{part}" in known for part in PARTS))


def quantization_config(ignore: Iterable[str], group_size: int | None = None) -> dict[str, Any]:
    """``quantization_config`` of a ``config.json`` for linear layers in this layout.

    Args:
        ignore: Names of linear modules that are stored dense.
        group_size: As in :func:`pack_quantized`.

    Example:
        >>> quantization_config(["lm_head"])["config_groups"]["group_0"]["weights"]
        {'num_bits': 4, 'type': 'int', 'symmetric': True, 'strategy': 'channel'}
    """
    weights: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
    if group_size is not None:
        weights |= {"strategy": "group", "group_size": group_size}
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
