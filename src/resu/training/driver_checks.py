"""What must hold before a driver can be made; each error says what was given and what to do."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch.optim import Optimizer

from resu.core.enforcement import is_held
from resu.core.globs import listing
from resu.core.layers import Layer
from resu.core.pattern import NM, Pattern
from resu.core.sharding import check_layout
from resu.pruning.budget import check_stacks, stack_rows
from resu.training.algorithms.base import Algorithm
from resu.training.budget import Distribution, check_distribution

__all__ = ["check_layers", "check_rule"]


def check_layers(layers: Mapping[str, Layer], optimizer: Optimizer) -> None:
    """Raise ``ValueError`` where weights cannot be held; warn of those that do not train.

    Args:
        layers: The selected weights.
        optimizer: What trains them.
    """
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(layer.weight) in owned for layer in layers.values()):
        raise ValueError(
            f"none of the {len(layers)} selected weights belongs to the optimizer; build the optimizer from "
            "the parameters of this model, after moving it to its device"
        )
    if unreal := [name for name, layer in layers.items() if layer.weight.is_meta]:
        raise ValueError(f"{listing(unreal, 5)}: on the meta device, without values to choose from; load them first")
    idle = [n for n, layer in layers.items() if id(layer.weight) not in owned or not layer.weight.requires_grad]
    if idle:
        warnings.warn(
            f"{len(idle)} of {len(layers)} selected weights are frozen or not in this optimizer "
            f"({listing(idle, 5)}): they are pruned all the same and cannot make up for it; exclude them, or "
            "make a Sparsifier for each optimizer",
            stacklevel=4,
        )
    taken = [name for name, layer in layers.items() if is_held(layer.weight)]
    if taken:
        raise ValueError(
            f"{', '.join(taken[:5])} {'is' if len(taken) == 1 else 'are'} held by a mask already; call commit() on "
            "the Sparsifier that made it, or remove_mask() on the layer, before another takes over"
        )
    for name, layer in layers.items():
        check_layout(name, layer.weight)


def check_rule(
    algorithm: Algorithm, pattern: Pattern, distribution: Distribution, layers: Mapping[str, Layer]
) -> Distribution:
    """Raise where a rule, a pattern and a distribution do not go together.

    Returns:
        The distribution that holds: N:M fixes every layer's share, so no named one can be kept beside it.

    Raises:
        TypeError: If the algorithm is no rule.
        ValueError: Otherwise.
    """
    if not isinstance(algorithm, Algorithm):
        raise TypeError(f"the algorithm is a rule such as RigL(sparsity=0.9), got {algorithm!r}")
    check_stacks(pattern, stack_rows(layers))
    check_distribution(distribution, {n: layer.weight.shape for n, layer in layers.items()}, algorithm.sparsity)
    if isinstance(pattern, NM) and abs(algorithm.sparsity - pattern.sparsity) > 1e-9:
        raise ValueError(
            f"pattern {pattern.n}:{pattern.m} has sparsity {pattern.sparsity:g}, the algorithm asks "
            f"for {algorithm.sparsity:g}; set the algorithm's sparsity to the pattern's"
        )
    if (reason := algorithm.refuses(pattern)) is not None:
        raise ValueError(reason)
    return "uniform" if isinstance(pattern, NM) and isinstance(distribution, str) else distribution
