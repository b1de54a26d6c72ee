"""Floating numbers as integers of the same order, so that comparing and counting them is exact in every dtype.

The key of a number is its bit pattern read as a signed integer, negative numbers mirrored: keys compare as the numbers
do, -0.0 and 0.0 share the key 0, and what lies beyond the keys of the infinities is NaN. A number has a key in its own
dtype (narrow), and one as float64 (wide), which is exact for all; thresholds are wide keys.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["FINITE", "INFINITE", "has_keys", "narrow", "score_keys", "wide_keys"]

Keys = NDArray[np.signedinteger]
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000, torch.float64: 0x7FF << 52}
INFINITE = _INFINITY
"""The key of infinity, by dtype; finite numbers have keys strictly between its negative and it."""
FINITE = _INFINITY[torch.float64] - 1
"""The largest wide key of a finite number; the smallest is its negative."""


def has_keys(dtype: torch.dtype) -> bool:
    """Whether numbers of this dtype have keys: the floating dtypes of 16 bits and more."""
    return dtype in _INFINITY


def score_keys(x: Tensor) -> Keys:
    """Keys of all elements, flat, in the integer dtype of their own size; a view where nothing is negative.

    Args:
        x: On the CPU, contiguous, of a dtype that :func:`has_keys`.

    Example:
        >>> score_keys(torch.tensor([0.0, -0.0, 1.0, -1.0])).tolist()
        [0, 0, 1065353216, -1065353216]
    """
    bits: Keys = x.detach().reshape(-1).view(_WORDS[x.element_size()]).numpy()
    if bits.size and bits.min() < 0:
        lowest = np.iinfo(bits.dtype).min
        bits = np.where(bits < 0, lowest - bits, bits)
    return bits


def _numbers(keys: Keys, dtype: torch.dtype) -> Tensor:
    lowest = np.iinfo(keys.dtype).min
    bits = np.where(keys < 0, lowest - keys, keys)
    return torch.from_numpy(np.ascontiguousarray(bits)).view(dtype)


def wide_keys(keys: Keys, dtype: torch.dtype) -> NDArray[np.int64]:
    """Wide keys from the keys of one dtype; exact."""
    if dtype == torch.float64:
        return keys.astype(np.int64, copy=False)
    found: NDArray[np.int64] = score_keys(_numbers(keys, dtype).double())
    return found


def narrow(key: int, dtype: torch.dtype, *, up: bool = False) -> int:
    """The key, in ``dtype``, of the largest number that is not above a wide key; ``up``: smallest not below.

    Example:
        >>> third = int(score_keys(torch.tensor([1 / 3], dtype=torch.float64))[0])
        >>> narrow(third, torch.float32, up=True) - narrow(third, torch.float32)
        1
    """
    exact = _numbers(np.array([key], dtype=np.int64), torch.float64)
    near = exact.to(dtype)
    found = int(score_keys(near)[0])
    if up and bool(near.double() < exact):
        return found + 1
    if not up and bool(near.double() > exact):
        return found - 1
    return found
