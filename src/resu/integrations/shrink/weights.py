"""Scores of heads and neurons from the weights alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from resu.core.layers import is_conv1d_of_transformers
from resu.core.randomness import derived_generator
from resu.integrations.shrink.families import Site

__all__ = ["random_scores", "weight_norms", "weight_of"]


def weight_of(module: nn.Module) -> Tensor:
    """A linear layer's weight as ``[out, in]``, detached."""
    weight = module.get_parameter("weight").detach()
    return weight.T if is_conv1d_of_transformers(module) else weight


def weight_norms(base: nn.Module, sites: Sequence[Site], order: int) -> dict[str, Tensor]:
    """The norm of all weights that go with a unit: its rows in the layers before it, its columns in the one after.

    Args:
        base: The base model.
        sites: Where the units are.
        order: 1 or 2.

    Returns:
        ``{site name: float64 [units]}``.
    """
    return {site.name: _norms(base, site, order) for site in sites}


def _norms(base: nn.Module, site: Site, order: int) -> Tensor:
    total = torch.zeros(site.count, dtype=torch.float64)
    for rows in site.inner:
        weight = weight_of(base.get_submodule(rows.module))
        part = weight[rows.start : rows.start + site.count * rows.size]
        total += part.abs().pow(order).sum(dim=1, dtype=torch.float64).cpu().view(site.count, -1).sum(dim=1)
    weight = weight_of(base.get_submodule(site.outer))
    total += weight.abs().pow(order).sum(dim=0, dtype=torch.float64).cpu().view(site.count, -1).sum(dim=1)
    return total.pow(1 / order)


def random_scores(sites: Sequence[Site], seed: int) -> dict[str, Tensor]:
    """Random numbers: what any other score must beat."""
    return {
        site.name: torch.rand(site.count, dtype=torch.float64, generator=derived_generator(seed, "unit", site.name))
        for site in sites
    }
