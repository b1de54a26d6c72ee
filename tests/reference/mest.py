"""MEST, restated from Yuan et al., arXiv 2110.14032, section 3.1 and 3.2, in plain Python.

p is a fraction of the kept weights here; in the paper it is one of all weights.
"""

from __future__ import annotations

from tests.reference.masked_training import part, ranked


def stage(t: int, begin: int, end: int, ratios: list[float]) -> float:
    """The mutation ratio falls in equally long stages; the last one lasts for ever."""
    length = (end - begin) / len(ratios)
    passed = sum(t >= begin + (k + 1) * length for k in range(len(ratios)))
    return ratios[min(passed, len(ratios) - 1)]


def importance(w: list[float], gradient: list[float], lam: float) -> list[float]:
    """``|w| + |λ ∂L/∂w|``."""
    return [abs(x) + abs(lam * g) for x, g in zip(w, gradient, strict=True)]


def em(score: list[float], mask: list[bool], draw: list[float], p: float) -> list[bool]:
    """Elastic mutation: ArgRemoveTo(s + p), then ArgGrowTo(s) at random."""
    active = [i for i in range(len(mask)) if mask[i]]
    k = part(p, len(active))
    stay = ranked(active, score)[: len(active) - k]
    grow = ranked([i for i in range(len(mask)) if i not in stay], draw)[:k]
    return [i in stay or i in grow for i in range(len(mask))]


def em_s(score: list[float], mask: list[bool], draw: list[float], p: float, n: int) -> list[bool]:
    """With the soft memory bound: remove down to n what the last update left, then grow p·n beyond n."""
    stay = ranked([i for i in range(len(mask)) if mask[i]], score)[:n]
    grow = ranked([i for i in range(len(mask)) if i not in stay], draw)[: part(p, n)]
    return [i in stay or i in grow for i in range(len(mask))]
