"""Exact counts: how many of ``n`` weights a sparsity removes, and which ones a score keeps.

A count is always an integer computed from the decimal the user wrote. It never comes from a
threshold, a quantile or a random draw, so that ties and rounding cannot change it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from numbers import Real

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "check_finite",
    "check_sparsity",
    "keep_count",
    "largest_remainder",
    "positions",
    "pruned_count",
    "top_k_mask",
    "top_k_rows",
]


def check_sparsity(sparsity: float, name: str = "sparsity") -> float:
    """Return ``sparsity`` unchanged if it is a number in [0, 1).

    Args:
        sparsity: Fraction of weights removed.
        name: What to call it in the error.

    Raises:
        TypeError: If it is not a real number (a string or a bool is not).
        ValueError: If it is NaN or outside [0, 1).

    Example:
        >>> check_sparsity(0.9)
        0.9
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real):
        raise TypeError(
            f"{name} must be a number in [0, 1), got {sparsity!r} of type {type(sparsity).__name__}; "
            "write for example 0.5 to remove half of the weights"
        )
    if math.isnan(sparsity) or not 0.0 <= sparsity < 1.0:
        hint = " (a percentage? divide by 100)" if 1.0 < sparsity <= 100.0 else ""
        raise ValueError(f"{name} must lie in [0, 1), got {sparsity!r}{hint}; it is the fraction of weights removed")
    return sparsity


def pruned_count(n: int, sparsity: float) -> int:
    """How many of ``n`` positions a sparsity removes: ``floor(n * sparsity)`` in exact decimals.

    The sparsity is read as the shortest decimal that prints it, so 0.29 of 100 is 29 although the
    binary product is 28.999….

    Example:
        >>> pruned_count(100, 0.29), pruned_count(50257 * 4096, 0.9)
        (29, 185267404)
    """
    check_sparsity(sparsity)
    return math.floor(n * Fraction(str(sparsity)))


def keep_count(n: int, sparsity: float, *, allow_empty: bool = False) -> int:
    """How many of ``n`` positions stay: ``n - pruned_count(n, sparsity)``, at least one.

    With ``sparsity < 1`` at least one of ``n >= 1`` always stays by the rounding itself;
    ``allow_empty`` exists for callers that pass ``n == 0``.

    Raises:
        ValueError: If ``n`` is 0 and ``allow_empty`` is False, or ``n`` is negative.
    """
    if n < 0 or (n == 0 and not allow_empty):
        raise ValueError(f"cannot prune a tensor with {n} elements; exclude empty layers")
    return n - pruned_count(n, sparsity)


def largest_remainder(
    total: int, quotas: Mapping[str, Fraction | float], caps: Mapping[str, int], minimum: int = 1
) -> dict[str, int]:
    """Round real quotas to integers that add up to ``total`` exactly.

    Every entry gets the floor of its quota, within ``[minimum, cap]``; what is left goes one by one to the entry
    that is furthest below its quota (ties: the earlier name). Where bounds have eaten too much, units come back
    from those furthest above in the same way.

    Args:
        total: The sum to reach.
        quotas: Wished real-valued share per name.
        caps: Largest allowed integer per name (the layer's size).
        minimum: Smallest allowed integer (lowered to the cap where that is smaller).

    Raises:
        ValueError: If no rounding can reach the total within the bounds.

    Example:
        >>> largest_remainder(10, {"a": 3.5, "b": 3.5, "c": 3.0}, {"a": 9, "b": 9, "c": 9})
        {'a': 4, 'b': 3, 'c': 3}
    """
    low = {k: min(minimum, caps[k]) for k in quotas}
    least, most = sum(low.values()), sum(caps[k] for k in quotas)
    if not least <= total <= most:
        raise ValueError(
            f"cannot place {total} kept weights: these {len(low)} layers hold between {least} "
            f"(at least {minimum} each) and {most}; use another sparsity or other layers"
        )
    if not quotas:
        return {}
    floors = {k: math.floor(q) for k, q in quotas.items()}

    def shifted(by: int) -> dict[str, int]:
        return {k: min(max(f + by, low[k]), caps[k]) for k, f in floors.items()}

    # The largest common shift of all floors that does not exceed the total; 0 or -1 unless bounds bite hard.
    reach = 1 + max(max(abs(f), caps[k]) for k, f in floors.items())
    down, up = -2 * reach, 2 * reach
    while up - down > 1:
        middle = (down + up) // 2
        down, up = (middle, up) if sum(shifted(middle).values()) <= total else (down, middle)
    result, next_up = shifted(down), shifted(down + 1)
    rising = [k for k in result if next_up[k] > result[k]]
    rising.sort(key=lambda k: floors[k] - Fraction(quotas[k]))  # stable: ties keep the earlier name
    for k in rising[: total - sum(result.values())]:
        result[k] += 1
    return result


def check_finite(x: Tensor, what: str) -> None:
    """Raise ``ValueError`` naming how many elements of ``x`` are NaN or infinite."""
    if not x.is_floating_point() or x.numel() == 0:
        return
    # One pass without a temporary: minimum and maximum are finite exactly if everything is.
    if not bool(torch.isfinite(torch.stack(_comparable(x.detach()).aminmax())).all()):
        bad = int((~torch.isfinite(x)).sum())
        verb = "hold" if what.startswith(("inputs", "scores")) else "holds"
        raise ValueError(
            f"{what} {verb} {bad} NaN or infinite values of {x.numel()}; clean the weights or statistics before pruning"
        )


def _comparable(scores: Tensor) -> Tensor:
    """Scores in a dtype whose order is exact and which the selection kernels know."""
    if scores.dtype in (torch.float32, torch.float64):
        return scores
    if scores.is_floating_point():
        return scores.float()  # exact for fp16, bf16, fp8
    return scores.to(torch.int64)


def top_k_mask(scores: Tensor, keep: int) -> Tensor:
    """Mask of the ``keep`` largest scores; among equal scores the lower flat index stays.

    Args:
        scores: Any shape, finite, floating or integer.
        keep: How many to keep, ``0 <= keep <= scores.numel()``.

    Returns:
        Bool tensor of the shape of ``scores`` with exactly ``keep`` True. O(n) time.

    Raises:
        ValueError: On NaN scores or an impossible ``keep``.

    Example:
        >>> top_k_mask(torch.tensor([1.0, 2.0, 2.0, 2.0]), 2)
        tensor([False,  True,  True, False])
    """
    return top_k_rows(scores.reshape(1, -1), keep).reshape(scores.shape)


def top_k_rows(scores: Tensor, keep: int | Sequence[int] | Tensor) -> Tensor:
    """Like :func:`top_k_mask` for each row of a 2-D tensor on its own.

    Args:
        scores: ``[rows, n]``.
        keep: One count for all rows, or one per row.

    Returns:
        Bool ``[rows, n]`` with exactly ``keep`` True per row.

    Raises:
        ValueError: On NaN scores, an impossible ``keep``, or not one count per row.
    """
    if scores.ndim != 2:
        raise ValueError(f"expected scores of shape [rows, n], got {tuple(scores.shape)}")
    rows, n = scores.shape
    if not isinstance(keep, int):
        counts = torch.as_tensor(keep, dtype=torch.int64)
        if counts.shape != (rows,):
            raise ValueError(f"keep has shape {tuple(counts.shape)}, expected one count per row ({rows},)")
        mask = torch.empty(rows, n, dtype=torch.bool, device=scores.device)
        for k in counts.unique().tolist():  # a handful of distinct counts (remainders), not one per row
            which = (counts == k).to(scores.device)
            mask[which] = top_k_rows(scores[which], k)
        return mask
    if not 0 <= keep <= n:
        raise ValueError(f"cannot keep {keep} of {n} positions")
    values = _comparable(scores.detach())
    if values.is_floating_point() and values.numel() and bool(values.amax().isnan()):
        raise ValueError(f"scores hold {int(torch.isnan(scores).sum())} NaN values; clean them before pruning")
    if keep == n:
        return torch.ones(rows, n, dtype=torch.bool, device=scores.device)
    if keep == 0:
        return torch.zeros(rows, n, dtype=torch.bool, device=scores.device)
    threshold = _kth_largest(values, keep)
    mask = values > threshold
    tied = values == threshold
    if rows == 1:  # one long row: indices are far cheaper than a cumulative sum
        index = positions(tied)[: keep - int(torch.count_nonzero(mask))]
        mask.view(-1)[index] = True
        return mask
    places = keep - mask.sum(dim=1, keepdim=True)
    return mask | (tied & (tied.cumsum(dim=1) <= places))


def positions(bits: Tensor) -> Tensor:
    """Flat int64 indices of the True elements of a bool tensor, ascending.

    On the CPU numpy does it, much faster than ``nonzero`` or boolean indexing under a random mask.

    Example:
        >>> positions(torch.tensor([[True, False], [False, True]]))
        tensor([0, 3])
    """
    if bits.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(bits.numpy()))
    return _nonzero_in_parts(bits.reshape(-1), 1 << 30)


def _nonzero_in_parts(flat: Tensor, size: int) -> Tensor:
    """``nonzero`` of a 1-D tensor, ``size`` elements at a time: CUDA refuses more than INT_MAX."""
    parts = [part.nonzero().view(-1).add_(i * size) for i, part in enumerate(flat.split(size))]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


_SAMPLED = 1 << 16  # longer rows are narrowed down before the selection, to make it faster


def _kth_largest(values: Tensor, k: int) -> Tensor:
    """The ``k``-th largest of each row, ``[rows, 1]``, in linear time; no NaN, ``1 <= k <= n``."""
    rows, n = values.shape
    if rows == 1 and n > _SAMPLED:
        middle, k = _narrowed(values[0], k)
        if len(middle) < n:
            return _kth_largest(middle[None], k)
    # Not kthvalue: it is quadratic on rows that descend, and refused in deterministic mode on CUDA.
    if k <= n // 2:
        return values.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    return values.topk(n - k + 1, dim=1, largest=False, sorted=False).values.amax(dim=1, keepdim=True)


def _narrowed(values: Tensor, k: int) -> tuple[Tensor, int]:
    """Fewer values with the ``k``-th largest among them, and its place there; all of them where that fails.

    A random sample says between which two values it must lie (Floyd & Rivest, CACM 18(3), 1975).
    """
    n, size = values.numel(), 1 << 12
    draw = torch.randint(n, (size,), generator=torch.Generator().manual_seed(0))
    sample = values[draw.to(values.device)].sort(descending=True).values
    slack = 4 * math.sqrt(size * k / n * (1 - k / n)) + 4
    first, last = math.floor(size * k / n - slack), math.ceil(size * k / n + slack)
    high = sample[first] if first >= 0 else values.amax()
    low = sample[last] if last < size else values.amin()
    near = values <= high
    above = n - int(torch.count_nonzero(near))
    near &= values >= low
    inside = int(torch.count_nonzero(near))
    if not 0 < k - above <= inside:
        return values, k
    if bool(high == low):
        return high[None], 1
    return (values.index_select(0, positions(near)), k - above) if inside <= n // 4 else (values, k)
