"""SET, restated from Mocanu et al., arXiv 1707.04780, with drops by |w| and growth at random, as RigL's authors do."""

from __future__ import annotations

from tests.reference.masked_training import part, ranked


def update(w: list[float], mask: list[bool], draw: list[float], f: float) -> list[bool]:
    """Remove the fraction f of smallest |w|, add as many random connections among those that are not there."""
    active = [i for i in range(len(w)) if mask[i]]
    k = part(f, len(active))
    stay = ranked(active, [abs(x) for x in w])[: len(active) - k]
    grow = ranked([i for i in range(len(w)) if i not in stay], draw)[:k]
    return [i in stay or i in grow for i in range(len(w))]
