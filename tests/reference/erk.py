"""Erdős–Rényi (kernel) densities, restated from Mocanu et al., arXiv 1707.04780, and Evci et al., arXiv 1911.11134.

One layer at a time becomes dense, in float64, as the formula with its two sums is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def densities(shapes: Mapping[str, Sequence[int]], sparsity: float, kernel: bool = True) -> dict[str, float]:
    """``density_l = ε · Σ dims_l / Π dims_l``, 1 for layers forced dense."""
    n = {k: math.prod(s) for k, s in shapes.items()}
    raw = {k: sum(s) / math.prod(s) if kernel else sum(s[:2]) / math.prod(s[:2]) for k, s in shapes.items()}
    dense: set[str] = set()
    while True:
        free = [k for k in shapes if k not in dense]
        if not free:
            return dict.fromkeys(shapes, 1.0)
        wished = (1 - sparsity) * sum(n[k] for k in free) - sparsity * sum(n[k] for k in dense)
        epsilon = wished / sum(raw[k] * n[k] for k in free)
        largest = max(free, key=lambda k: raw[k])
        if epsilon * raw[largest] <= 1:
            return {k: 1.0 if k in dense else epsilon * raw[k] for k in shapes}
        dense.add(largest)
