"""RIA, restated from Zhang et al., "Plug-and-Play", ICLR 2024, weight by weight in float64."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def scores(weight: Array, inputs: Array, a: float = 0.5) -> Array:
    """``(|W_ij| / Σ_j |W_ij| + |W_ij| / Σ_i |W_ij|) · ‖X_j‖₂^a`` for weight ``[out, in]``, inputs ``[tokens, in]``."""
    result = np.zeros_like(weight)
    for i, j in np.ndindex(*weight.shape):
        row = math.fsum(abs(w) for w in weight[i])
        column = math.fsum(abs(w) for w in weight[:, j])
        norm = math.sqrt(math.fsum(x * x for x in inputs[:, j]))
        w = abs(weight[i, j])
        result[i, j] = ((w / row if row else 0) + (w / column if column else 0)) * norm**a
    return result
