"""The selective update written coordinate by coordinate in plain Python floats (double precision)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


def update(
    theta: Sequence[float],
    grad: Sequence[float],
    m: Sequence[float],
    v: Sequence[float],
    *,
    beta: float,
    delta: float,
    tau: float,
    k_screen: float,
    k_select: float,
    lr: float,
    weight_decay: float,
) -> tuple[list[float], list[float], list[float], list[int]]:
    """New theta, m, v and the selected coordinates."""
    p = len(theta)
    m = [beta * a + (1 - beta) * g for a, g in zip(m, grad, strict=True)]
    v = [beta * a + (1 - beta) * abs(g) for a, g in zip(v, grad, strict=True)]
    c = [abs(a) / (b + delta) for a, b in zip(m, v, strict=True)]
    by_size = sorted(range(p), key=lambda i: (-abs(grad[i]), i))
    screened = set(by_size[: math.ceil(Fraction(str(k_screen)) * p)])
    both = [i for i in by_size if i in screened and c[i] > tau]
    selected = both[: math.ceil(Fraction(str(k_select)) * p)]
    theta = list(theta)
    for i in selected:
        theta[i] -= lr * (c[i] * grad[i] + weight_decay * theta[i])
    return theta, m, v, sorted(selected)
