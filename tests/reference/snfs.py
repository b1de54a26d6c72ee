"""Sparse momentum, restated from Dettmers & Zettlemoyer, arXiv 1907.04840, algorithm 1, in plain Python.

The momentum is an exponential mean of dense gradients; shares are rounded by largest remainder.
"""

from __future__ import annotations

import math

from tests.reference.masked_training import part, ranked


def smooth(momentum: list[float], gradient: list[float], beta: float) -> list[float]:
    """``M ← βM + (1 - β) ∂L/∂W``."""
    return [beta * m + (1 - beta) * g for m, g in zip(momentum, gradient, strict=True)]


def budgets(masks: list[list[bool]], momenta: list[list[float]], f: float) -> list[int]:
    """How many weights each layer has after the update: what all drop, divided by the mean |momentum| of each."""
    counts = [sum(mask) for mask in masks]
    drops = [part(f, n) for n in counts]
    means = [
        sum(abs(m) for m, inside in zip(momentum, mask, strict=True) if inside) / n
        for momentum, mask, n in zip(momenta, masks, counts, strict=True)
    ]
    wished = [n - d + x / sum(means) * sum(drops) for n, d, x in zip(counts, drops, means, strict=True)]
    given = [min(math.floor(x), len(mask)) for x, mask in zip(wished, masks, strict=True)]
    while sum(given) < sum(counts):
        open_ = [k for k in range(len(given)) if given[k] < len(masks[k])]
        given[max(open_, key=lambda k: (wished[k] - given[k], -k))] += 1
    return given


def update(w: list[float], mask: list[bool], momentum: list[float], f: float, keep: int) -> list[bool]:
    """Drop the fraction f of smallest |w|, fill up by |momentum|."""
    active = [i for i in range(len(w)) if mask[i]]
    stay = ranked(active, [abs(x) for x in w])[: len(active) - part(f, len(active))]
    rest = [i for i in range(len(w)) if i not in stay]
    grow = ranked(rest, [abs(x) for x in momentum])[: keep - len(stay)]
    return [i in stay or i in grow for i in range(len(w))]
