"""Allocations by shape alone: uniform, Erdős–Rényi, Erdős–Rényi kernel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

from resu.core.counting import check_sparsity, keep_count, largest_remainder
from resu.pruning.allocation.base import allocations, ignores_scores, layer_sizes

__all__ = ["erdos_renyi_densities"]

Shapes = Mapping[str, torch.Size]


@allocations.register("uniform")
@ignores_scores
def uniform(shapes: Shapes, sparsity: float, scores: Mapping[str, Tensor] | None = None) -> dict[str, int]:
    """The same sparsity in every layer, up to rounding (largest remainders, so that the total is exact).

    Cost: none. Fails: where small layers matter most, as first convolutions do; ``"erk"`` spares them.
    """
    sizes = layer_sizes(shapes)
    total = sum(sizes.values())
    keep = keep_count(total, sparsity)
    return largest_remainder(keep, {name: Fraction(n * keep, total) for name, n in sizes.items()}, sizes)


@allocations.register("er")
@ignores_scores
def er(shapes: Shapes, sparsity: float, scores: Mapping[str, Tensor] | None = None) -> dict[str, int]:
    """Erdős–Rényi: density proportional to ``(in + out) / (in * out)``, small layers denser.

    Paper: Mocanu et al., arXiv 1707.04780, eq. 1. Cost: none. Fails: on convolutions, whose kernel it does not
    see; ``"erk"`` does. Layers that would hold more than they have are dense and the rest is solved again.
    """
    return _proportional(shapes, sparsity, kernel=False)


@allocations.register("erk")
@ignores_scores
def erk(shapes: Shapes, sparsity: float, scores: Mapping[str, Tensor] | None = None) -> dict[str, int]:
    """Erdős–Rényi kernel: density proportional to ``Σ dims / Π dims``, the kernel's dimensions among them.

    Paper: Evci et al., arXiv 1911.11134, §3. Cost: none; more multiplications than ``"uniform"`` where convolutions run
    at many places. Fails: for one-shot pruning of trained networks, where the layers' own scores
    (``"global"``, ``"lamp"``, ``"owl"``) know more. Differs from the authors' code in the rounding alone: counts
    are exact in total and every layer keeps a weight.
    """
    return _proportional(shapes, sparsity, kernel=True)


def erdos_renyi_densities(shapes: Shapes, sparsity: float, *, kernel: bool = True) -> dict[str, Fraction]:
    """The fraction of each layer that ``"erk"`` (``"er"`` without ``kernel``) keeps, before rounding to whole weights.

    ``density_l = ε · Σdims_l / Πdims_l``, with ε such that the total is the asked one; layers that would exceed 1 are
    dense, and ε is solved again for the others.

    Args:
        shapes: Shape of each layer's weight.
        sparsity: Fraction of all weights removed, in [0, 1).
        kernel: Whether kernel dimensions count; else the first two do.

    Returns:
        Exact fractions in (0, 1].

    Example:
        >>> shapes = {"small": torch.Size([2, 2]), "large": torch.Size([100, 100])}
        >>> {name: float(d) for name, d in erdos_renyi_densities(shapes, 0.5).items()}
        {'small': 1.0, 'large': 0.4998}
    """
    total = sum(layer_sizes(shapes).values())
    left = Fraction(total) * (1 - Fraction(str(check_sparsity(sparsity))))
    return {name: quota / shapes[name].numel() for name, quota in _quotas(shapes, left, kernel).items()}


def _quotas(shapes: Shapes, left: Fraction, kernel: bool) -> dict[str, Fraction]:
    """Real counts proportional to the sums of dimensions, no more than each layer has, ``left`` in total.

    A layer that becomes dense leaves more to the others (it takes less than its share), so all that exceed can be
    taken at once, none comes back, and what is left stays positive: there is always a solution.
    """
    sizes = layer_sizes(shapes)
    parts = {k: sum(s) if kernel else sum(s[:2]) * math.prod(s[2:]) for k, s in shapes.items()}
    free = list(sizes)
    epsilon = Fraction(0)
    while free:
        epsilon = left / sum(parts[k] for k in free)
        dense = {k for k in free if epsilon * parts[k] >= sizes[k]}
        if not dense:
            break
        left -= sum(sizes[k] for k in dense)
        free = [k for k in free if k not in dense]
    still = set(free)
    return {k: epsilon * parts[k] if k in still else Fraction(n) for k, n in sizes.items()}


def _proportional(shapes: Shapes, sparsity: float, *, kernel: bool) -> dict[str, int]:
    sizes = layer_sizes(shapes)
    total = keep_count(sum(sizes.values()), sparsity)
    return largest_remainder(total, _quotas(shapes, Fraction(total), kernel), sizes)
