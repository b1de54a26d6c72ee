"""Allocations: how a model's budget of kept weights is divided over its layers.

An allocation is a function ``(shapes, sparsity, scores) -> {name: keep}`` of exact counts. Register one with
``@allocations.register("name")`` and it works wherever a distribution is taken by name; mark it with
``@ignores_scores`` where it looks at shapes alone.
"""

from resu.pruning.allocation.base import (
    Allocation,
    allocate,
    allocations,
    described,
    ignores_scores,
    match_sparsities,
    needs_scores,
)
from resu.pruning.allocation.outliers import owl
from resu.pruning.allocation.ranking import global_masks
from resu.pruning.allocation.shapes import erdos_renyi_densities

__all__ = [
    "Allocation",
    "allocate",
    "allocations",
    "described",
    "erdos_renyi_densities",
    "global_masks",
    "ignores_scores",
    "match_sparsities",
    "needs_scores",
    "owl",
]
