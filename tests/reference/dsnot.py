"""DSnoT written from arXiv 2310.08915 (eq. 3 to 5, algorithm 1), one row and one swap at a time, in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def residual(weight: Array, mask: Mask, mean: Array) -> Array:
    """What is missing from each row's mean output: ``Σ_pruned w E[x]``."""
    return np.where(mask, 0.0, weight * mean).sum(axis=1)


def refine(
    weight: Array,
    mask: Mask,
    mean: Array,
    norm: Array,
    *,
    variance: Array | None = None,
    m: int | None = None,
    rounds: int = 50,
    threshold: float = 0.1,
) -> Mask:
    """The refined mask; ``m``: swaps stay within groups of m columns."""
    mask = mask.copy()
    rows, n = weight.shape
    for r in range(rows):
        w = weight[r].astype(np.float64)
        for _ in range(rounds):
            error = float(sum(w[k] * mean[k] for k in range(n) if not mask[r, k]))
            if abs(error) <= threshold:
                break
            sign = 1.0 if error > 0 else -1.0

            def partner(i: int, sign: float = sign, w: Array = w, r: int = r) -> int | None:
                """Eq. 5: the kept weight of least Wanda score whose removal takes from the error, beside i."""
                found = None
                for k in range(n):
                    together = m is None or k // m == i // m
                    if together and mask[r, k] and sign * w[k] * mean[k] < 0:
                        score = abs(w[k]) * norm[k]
                        if found is None or score < abs(w[found]) * norm[found]:
                            found = k
                return found

            grown = None
            for k in range(n):  # eq. 4
                if mask[r, k] or sign * w[k] * mean[k] <= 0 or partner(k) is None:
                    continue
                gain = sign * w[k] * mean[k] / (1.0 if variance is None else variance[k])
                if grown is None or gain > sign * w[grown] * mean[grown] / (
                    1.0 if variance is None else variance[grown]
                ):
                    grown = k
            if grown is None:
                break
            given = partner(grown)
            assert given is not None
            after = error - w[grown] * mean[grown] + w[given] * mean[given]
            if abs(after) >= abs(error):
                break
            mask[r, grown], mask[r, given] = True, False
    return mask
