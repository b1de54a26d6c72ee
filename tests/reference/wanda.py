"""Wanda, restated from Sun et al., arXiv 2306.11695, in float64: eq. 1, then a sort of each row or group."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def scores(weight: Array, inputs: Array) -> Array:
    """``S_ij = |W_ij| · ‖X_j‖₂`` for weight ``[out, in]`` and inputs ``[tokens, in]``."""
    norms = [math.sqrt(math.fsum(x * x for x in column)) for column in inputs.T.tolist()]
    return np.abs(weight) * np.array(norms)


def best(values: Array, keep: int) -> Mask:
    """The ``keep`` largest of a row; the lower index wins ties."""
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    mask = np.zeros(len(values), dtype=bool)
    mask[order[:keep]] = True
    return mask


def by_row(score: Array, sparsity: float) -> Mask:
    """In every output row ``floor(in · s)`` weights go."""
    columns = score.shape[1]
    keep = columns - math.floor(Fraction(str(sparsity)) * columns)
    return np.stack([best(row, keep) for row in score])


def n_of_m(score: Array, n: int, m: int) -> Mask:
    """The n best of every m consecutive inputs of a row."""
    rows = []
    for row in score:
        groups = [row[start : start + m] for start in range(0, len(row), m)]
        rows.append(np.concatenate([best(group, min(n, len(group))) for group in groups]))
    return np.stack(rows)


def unfolded(images: Array, kernel: int) -> Array:
    """The patches a ``kernel × kernel`` convolution without padding sees: ``[patches, channels · kernel²]``."""
    batch, _, height, width = images.shape
    return np.array(
        [
            images[b, :, y : y + kernel, x : x + kernel].reshape(-1)
            for b in range(batch)
            for y in range(height - kernel + 1)
            for x in range(width - kernel + 1)
        ]
    )
