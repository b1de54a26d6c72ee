"""SR-STE, restated from Zhou et al., arXiv 2102.04010, equation 9 (STE: λ = 0), in plain Python, momentum SGD.

Weight decay acts on active weights alone.
"""

from __future__ import annotations

from tests.reference.masked_training import ranked


def n_of_m(score: list[float], n: int, m: int, width: int) -> list[bool]:
    """The n largest of every m consecutive columns of a row."""
    mask = [False] * len(score)
    for row in range(0, len(score), width):
        for start in range(row, row + width, m):
            for i in ranked(list(range(start, min(start + m, row + width))), score)[:n]:
                mask[i] = True
    return mask


def step(
    w: list[float],
    v: list[float],
    mask: list[bool],
    g: list[float],
    lr: float,
    momentum: float,
    decay: float,
    lam: float,
) -> None:
    """``W ← W - γ (g(M⊙W) + λ (1 - M)⊙W)``, in place; g passes straight through the mask."""
    for i in range(len(w)):
        grad = g[i] + (decay if mask[i] else lam) * w[i]
        v[i] = momentum * v[i] + grad
        w[i] -= lr * v[i]
