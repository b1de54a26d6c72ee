"""AC/DC, restated from Peste et al., arXiv 2106.12379, algorithm 1, in plain Python."""

from __future__ import annotations

from tests.reference.masked_training import best


def phases(warm_up: int, length: int, last: int, steps: int) -> list[bool]:
    """For each step whether it is taken sparse: a dense warm-up, then sparse and dense in turn, the last one sparse."""
    plan: list[bool] = [False] * warm_up
    sparse = True
    while len(plan) < last:
        plan += [sparse] * length
        sparse = not sparse
    return plan[:last] + [True] * (steps - last)


def compress(w: list[float], keep: int) -> list[bool]:
    """``T_k(θ)``: the k largest |w|, of all."""
    return best([abs(x) for x in w], keep)
