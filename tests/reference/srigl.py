"""SRigL, restated from Lasby et al., arXiv 2305.02299, section 3.1, steps 1 to 7, in plain Python.

Where the budget does not divide by the neurons, the first of them hold one weight more.
"""

from __future__ import annotations

import math

from tests.reference.masked_training import part, ranked


def constant_fan_in(score: list[float], rows: int, keep: int) -> list[bool]:
    """The best of each row, as many as its share."""
    width = len(score) // rows
    mask: list[bool] = []
    for r in range(rows):
        share = keep // rows + (r < keep % rows)
        chosen = ranked(list(range(r * width, (r + 1) * width)), score)[:share]
        mask += [i in chosen for i in range(r * width, (r + 1) * width)]
    return mask


def update(
    w: list[float], mask: list[bool], gradient: list[float], f: float, gamma: float, rows: int, keep: int
) -> list[bool]:
    """One update of a layer of ``rows`` neurons, ``keep`` weights in all."""
    n, width = len(w), len(w) // rows
    size, wish = [abs(x) for x in w], [abs(x) for x in gradient]
    active, pruned = [i for i in range(n) if mask[i]], [i for i in range(n) if not mask[i]]
    k = part(f, keep)
    large = ranked(active, size)[: keep - k]
    wanted = ranked(pruned, wish)[:k]
    salient = [sum(i // width == r for i in large + wanted) for r in range(rows)]
    # Step 4: a neuron with fewer salient weights than γ·(fan-in) is given up; one without any in every case.
    alive = [r for r in range(rows) if gamma == 0 or salient[r] >= max(1.0, gamma * keep / rows)]
    fewest = math.ceil(keep / width)  # below that the others cannot hold the budget
    if len(alive) < fewest:
        alive = sorted(ranked(list(range(rows)), [float(x) for x in salient])[:fewest])
    new = [False] * n
    for place, r in enumerate(alive):
        share = keep // len(alive) + (place < keep % len(alive))
        row = range(r * width, (r + 1) * width)
        stay = ranked([i for i in row if i in large], size)[:share]
        grow = ranked([i for i in row if i not in stay], wish)[: share - len(stay)]
        for i in stay + grow:
            new[i] = True
    return new
