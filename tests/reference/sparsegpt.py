"""SparseGPT written from arXiv 2301.00774 in float64, column by column, each time with a fresh inverse.

Step j of the algorithm has the columns F = {j, j+1, …} still free. It inverts the Hessian of those (the matrix that the
paper's Cholesky factor holds a row of, section 3.2), scores weights by eq. 3, and where column j is pruned applies the
optimal brain surgeon's update of eq. 3 to F. No factor, no lazy batch, no shortcut.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def damped(hessian: Array, damping: float = 0.01) -> tuple[Array, Mask]:
    """H with 1 at dead inputs and ``damping`` times its mean diagonal added; which inputs are dead."""
    h = np.array(hessian, dtype=np.float64)
    dead = np.diag(h) == 0
    h[dead, dead] = 1.0
    return h + damping * np.mean(np.diag(h)) * np.eye(len(h)), dead


def obs_score(weight: Array, hessian: Array, damping: float = 0.01) -> Array:
    """``w² / [H⁻¹]_jj`` (eq. 3) of every weight."""
    h, dead = damped(hessian, damping)
    w = np.where(dead, 0.0, weight.astype(np.float64))
    return w**2 / np.diag(np.linalg.inv(h))


def shares(keep: int, sizes: list[int]) -> list[int]:
    """``keep`` over parts of these sizes, by largest remainder; of equal remainders the earlier part first."""
    exact = [Fraction(keep * size, sum(sizes)) for size in sizes]
    counts = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda k: (counts[k] - exact[k], k))
    for k in by_remainder[: keep - sum(counts)]:
        counts[k] += 1
    return counts


def best(scores: Array, keep: int) -> Mask:
    """The ``keep`` largest of a matrix, ties to the lower index read row by row."""
    flat = scores.reshape(-1)
    order = sorted(range(flat.size), key=lambda k: (-flat[k], k))
    mask = np.zeros(flat.size, dtype=bool)
    mask[order[:keep]] = True
    return mask.reshape(scores.shape)


def sweep(
    weight: Array,
    hessian: Array,
    *,
    keep: int = 0,
    scope: str = "tensor",
    nm: tuple[int, int] | None = None,
    mask: Mask | None = None,
    block: int = 128,
    damping: float = 0.01,
) -> tuple[Array, Mask]:
    """Updated weights and mask; give ``keep`` (with ``scope`` tensor or row), ``nm``, or a ``mask``."""
    h, dead = damped(hessian, damping)
    w = np.where(dead, 0.0, weight.astype(np.float64))
    rows, n = w.shape
    starts = list(range(0, n, block))
    widths = [min(block, n - start) for start in starts]
    kept = np.ones((rows, n), dtype=bool) if mask is None else mask.copy()
    for j in range(n):
        inverse = np.linalg.inv(h[j:, j:])
        if mask is None and nm is not None and j % nm[1] == 0:
            here = slice(j, min(j + nm[1], n))
            scores = w[:, here] ** 2 / diagonals(h, j, here)
            for r in range(rows):
                kept[r, here] = best(scores[r], min(nm[0], scores.shape[1]))
        if mask is None and nm is None and j in starts:
            k = starts.index(j)
            here = slice(j, j + widths[k])
            scores = w[:, here] ** 2 / diagonals(h, j, here)
            if scope == "tensor":
                kept[:, here] = best(scores, shares(keep, [rows * width for width in widths])[k])
            else:
                for r in range(rows):
                    of_row = keep // rows + (r < keep % rows)
                    kept[r, here] = best(scores[r], shares(of_row, widths)[k])
        # eq. 3: δ = -w_j / [H⁻¹]_jj · H⁻¹_{:,j}, for the rows whose weight j goes.
        for r in range(rows):
            if not kept[r, j]:
                w[r, j:] -= w[r, j] / inverse[0, 0] * inverse[0, :]
                w[r, j] = 0.0
    return w, kept


def diagonals(h: Array, j: int, columns: slice) -> Array:
    """For each column c: ``[(H_{c:, c:})⁻¹]_00``, the cost of removing c when all columns before it are settled."""
    return np.array([np.linalg.inv(h[c:, c:])[0, 0] for c in range(columns.start, columns.stop)])


def least_squares(weight: Array, mask: Mask, hessian: Array) -> Array:
    """The best weights there are under a mask: each row solves its own normal equations ``H_KK v = H_K: wᵀ``."""
    w = weight.astype(np.float64)
    result = np.zeros_like(w)
    for r in range(len(w)):
        kept = np.flatnonzero(mask[r])
        result[r, kept] = np.linalg.lstsq(hessian[np.ix_(kept, kept)], hessian[kept] @ w[r], rcond=None)[0]
    return result


def output_error(weight: Array, other: Array, hessian: Array) -> Array:
    """``½ δ H δᵀ`` of each row: the mean squared difference of its output on the calibration inputs."""
    delta = weight.astype(np.float64) - other
    return 0.5 * np.einsum("ri,ij,rj->r", delta, hessian, delta)
