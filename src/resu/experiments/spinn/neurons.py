"""The physically smaller twin: neurons taken out in stages, verified, fine-tuned; faster without any kernel."""

from __future__ import annotations

import copy
import math

from torch import nn

from resu.experiments.spinn.fitting import Recipe, fit
from resu.experiments.spinn.recording import Prepared
from resu.experiments.spinn.sparse import STAGES, TARGET
from resu.experiments.spinn.twin import Twin
from resu.pruning.stage_plan import plan_stages
from resu.pruning.structured.pruner import StructuredPruner

__all__ = ["remove_neurons", "widths"]


def widths(network: nn.Sequential) -> tuple[int, ...]:
    """Neurons of the hidden layers.

    Example:
        >>> widths(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)))
        (8,)
    """
    linear = [layer for layer in network if isinstance(layer, nn.Linear)]
    return tuple(layer.out_features for layer in linear[:-1])


def remove_neurons(twin: Twin, data: Prepared, recipe: Recipe, *, target: float = TARGET) -> tuple[Twin, float]:
    """A copy with a fraction ``target`` of the parameters gone as whole neurons, in as many stages as pruning has.

    After each stage the smaller network has been compared with the one whose neurons are zeroed, in float64
    (:class:`~resu.pruning.structured.pruner.StructuredPruner`), then it is fine-tuned for ``recipe.tune`` steps.

    Returns:
        The smaller twin, and the largest relative difference that verification found.
    """
    twin = copy.deepcopy(twin)
    dense = sum(p.numel() for p in twin.network.parameters())
    pruner = StructuredPruner(target, data.inputs[:1], target="parameters", round_to=4)
    worst = 0.0
    for sparsity in plan_stages(target, STAGES).sparsities:
        result = pruner.prune(twin.network, sparsity=sparsity, dense=float(dense))
        result.forget()
        worst = max(worst, result.error)
        fit(twin, data, recipe, steps=recipe.tune, rate=recipe.tune_rate)
    left = sum(p.numel() for p in twin.network.parameters())
    if left > math.ceil((1 - target) * dense):
        raise RuntimeError(f"{left} of {dense} parameters are left, more than {1 - target:.0%}")
    return twin, worst
