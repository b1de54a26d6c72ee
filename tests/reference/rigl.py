"""RigL, restated from Evci et al., arXiv 1911.11134, section 3 and algorithm 1, in plain Python."""

from __future__ import annotations

import math

from tests.reference.masked_training import part, ranked


def fraction(t: int, alpha: float, t_end: int) -> float:
    """Equation 1: ``f(t; α, T_end) = α/2 (1 + cos(tπ / T_end))``, no update from T_end on."""
    return alpha / 2 * (1 + math.cos(t * math.pi / t_end)) if t < t_end else 0.0


def update(w: list[float], mask: list[bool], gradient: list[float], f: float) -> list[bool]:
    """``θ ∖ argtopk(-|θ|, k)``, then ``argtopk_{i ∉ θ ∖ dropped} |∇L|``: what was just dropped is a candidate."""
    active = [i for i in range(len(w)) if mask[i]]
    k = part(f, len(active))
    stay = ranked(active, [abs(x) for x in w])[: len(active) - k]
    grow = ranked([i for i in range(len(w)) if i not in stay], [abs(x) for x in gradient])[:k]
    return [i in stay or i in grow for i in range(len(w))]
