"""OWL: blocks of a network with more outliers among their scores keep more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from numbers import Real

import torch
from torch import Tensor

from resu.core.counting import check_finite, keep_count, largest_remainder
from resu.pruning.allocation.base import Allocation, allocations, layer_sizes, needed_scores

__all__ = ["block_of", "outlier_share", "owl"]

_CHUNK = 1 << 22


def block_of(name: str) -> str:
    """The block a layer belongs to: its name through the last numeric component, else the name itself.

    Example:
        >>> block_of("model.layers.3.mlp.up_proj.weight"), block_of("lm_head.weight")
        ('model.layers.3', 'lm_head.weight')
    """
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdecimal()), default=len(parts) - 1)
    return ".".join(parts[: last + 1])


def owl(M: float = 5.0, lam: float = 0.08, *, blocks: Callable[[str], str] = block_of) -> Allocation:
    """Outlier-weighed layerwise sparsity: ``"owl"`` with options of one's own.

    The share of a block's scores above M times their mean, D, says how much the block may keep: densities are ``(1 -
    sparsity) + 2λ·(D - min D)/(max D - min D)``, less the mean of the second term over all weights, and the same for
    all layers of a block.

    Paper: Yin et al., arXiv 2310.05175, the layerwise outlier distribution (M = 5, λ = 0.08, with ``wanda`` scores).
    Cost: two passes over the scores. Fails: with few blocks (with one it is ``"uniform"``), with scores that have no
    outliers, and where densities leave (0, 1]: those are clipped, and the others moved until the total is right.
    Differs from the authors' code: the mean that is taken off is over weights, not blocks, so that the total is exact
    where blocks differ in size, and the counts are integers.

    Args:
        M: How many times the mean an outlier exceeds, positive.
        lam: λ, in [0, 0.5): densities spread over 2λ.
        blocks: The block of a parameter name; by default its name through the last numeric component.

    Returns:
        A function that goes wherever a distribution is taken.

    Raises:
        TypeError: If an option is no number.
        ValueError: On options out of range; when called, on scores that are missing, negative or not finite.

    Example:
        >>> from resu.pruning.allocation import allocate
        >>> flat, spiky = torch.ones(10, 10), torch.ones(10, 10)
        >>> spiky[0] = 100.0
        >>> scores = {"0.weight": flat, "1.weight": spiky}
        >>> allocate(owl(lam=0.1), {name: s.shape for name, s in scores.items()}, 0.5, scores)
        {'0.weight': 40, '1.weight': 60}
    """
    for name, value in (("M", M), ("lam", lam)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not M > 0:
        raise ValueError(f"M must be positive, got {M!r}; an outlier exceeds M times the mean score")
    if not 0 <= lam < 0.5:
        raise ValueError(f"lam must lie in [0, 0.5), got {lam!r}; densities spread over 2 * lam")

    def outlier_weighed(
        shapes: Mapping[str, torch.Size], sparsity: float, scores: Mapping[str, Tensor] | None = None
    ) -> dict[str, int]:
        found, sizes = needed_scores("owl", shapes, scores), layer_sizes(shapes)
        members: dict[str, list[str]] = {}
        for name in shapes:
            members.setdefault(blocks(name), []).append(name)
        shares = {block: outlier_share([found[n] for n in names], M, block) for block, names in members.items()}
        weights = {block: sum(sizes[n] for n in names) for block, names in members.items()}
        densities = _densities(shares, weights, sparsity, lam)
        quotas = {name: densities[block] * sizes[name] for block, names in members.items() for name in names}
        total = keep_count(sum(sizes.values()), sparsity)
        return largest_remainder(total, {name: quotas[name] for name in shapes}, sizes)

    return outlier_weighed


allocations.register("owl")(owl())


def outlier_share(scores: list[Tensor], multiple: float, block: str = "") -> Fraction:
    """The share of scores above ``multiple`` times the mean of all of them.

    Raises:
        ValueError: On negative or not finite scores.
    """
    for score in scores:
        check_finite(score, f"scores of block {block!r}")
        if bool((score.amin() < 0).item()):
            raise ValueError(
                f"distribution 'owl' compares scores with their mean, and those of block {block!r} go down to "
                f"{score.amin().item():g}; use scores that are not negative"
            )
    n = sum(score.numel() for score in scores)
    limit = multiple * sum(float(score.sum(dtype=torch.float64)) for score in scores) / n
    outliers = sum(int((c.double() > limit).sum()) for score in scores for c in score.reshape(-1).split(_CHUNK))
    return Fraction(outliers, n)


def _densities(
    shares: Mapping[str, Fraction], weights: Mapping[str, int], sparsity: float, lam: float
) -> dict[str, Fraction]:
    low, spread = min(shares.values()), max(shares.values()) - min(shares.values())
    total = sum(weights.values())
    density = 1 - Fraction(str(sparsity))
    raised = {b: 2 * Fraction(str(lam)) * (d - low) / spread if spread else Fraction(0) for b, d in shares.items()}
    mean = sum((raised[b] * n for b, n in weights.items()), Fraction(0)) / total
    wished = {b: density + r - mean for b, r in raised.items()}
    return _clipped(wished, weights, density * total)


def _clipped(wished: Mapping[str, Fraction], weights: Mapping[str, int], total: Fraction) -> dict[str, Fraction]:
    """Densities in [0, 1] that hold ``total`` weights: all moved by the same amount, then clipped."""
    # What is held is piecewise linear in the amount, with a corner where a density reaches 0 or 1.
    corners = sorted({edge - w for w in wished.values() for edge in (0, 1)})

    def held(by: Fraction) -> Fraction:
        return sum((min(max(w + by, Fraction(0)), Fraction(1)) * weights[b] for b, w in wished.items()), Fraction(0))

    below = max((c for c in corners if held(c) <= total), default=corners[0])
    moving = sum(weights[b] for b, w in wished.items() if 0 <= w + below < 1)
    by = below + (total - held(below)) / moving if moving else below
    return {b: min(max(w + by, Fraction(0)), Fraction(1)) for b, w in wished.items()}
