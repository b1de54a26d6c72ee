"""GraNet, restated from Liu et al., arXiv 2106.10404, algorithm 1, in plain Python; counts per layer."""

from __future__ import annotations

from tests.reference import rigl
from tests.reference.masked_training import ranked


def update(w: list[float], mask: list[bool], gradient: list[float], keep: int, f: float) -> list[bool]:
    """Prune to the ramp by |w|; then remove the fraction f of what is left and regenerate as many by gradient."""
    order = ranked([i for i in range(len(w)) if mask[i]], [abs(x) for x in w])
    pruned = [i in order[:keep] for i in range(len(w))]
    return rigl.update(w, pruned, gradient, f)
