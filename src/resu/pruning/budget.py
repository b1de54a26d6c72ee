"""What a user asked for, checked as a whole: one sparsity or several, a pattern, a division over the layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from resu.core.counting import check_sparsity
from resu.core.pattern import NM, Pattern
from resu.pruning.allocation import Allocation, allocate, allocations, match_sparsities, needs_scores

__all__ = ["Budget", "plan_budget"]

Distribution = str | Allocation


@dataclass(frozen=True)
class Budget:
    """How much each layer keeps, as far as it can be said before scores are there.

    Attributes:
        pattern: Which positions compete.
        sparsities: ``{name: sparsity}`` of the layers that get a mask.
        distribution: How one sparsity is divided over them; None: each layer has its own.
        sparsity: That one sparsity; None where layers have their own.
    """

    pattern: Pattern
    sparsities: Mapping[str, float]
    distribution: Distribution | None = None
    sparsity: float | None = None

    @property
    def needs_scores(self) -> bool:
        """Whether :meth:`keeps` looks at the scores of all layers."""
        return needs_scores(self.distribution)

    def keeps(self, shapes: Mapping[str, torch.Size], scores: Mapping[str, Tensor] | None = None) -> dict[str, int]:
        """Exact counts of kept weights by layer.

        Where the pattern has larger parts than single weights (blocks, channels), each layer's share is rounded down to
        whole parts, at least one, so that the total may fall short of the budget by less than a part per layer.

        Args:
            shapes: Shapes as patterns see them, ``[out, in…]``.
            scores: Of those shapes; needed where :attr:`needs_scores` says so.

        Raises:
            ValueError: If a pattern cannot have a layer's sparsity, or a layer cannot keep one weight.
        """
        if self.distribution is None:
            return {name: self.pattern.keep_for(shapes[name], s) for name, s in self.sparsities.items()}
        assert self.sparsity is not None
        shapes = {name: shapes[name] for name in self.sparsities}
        keeps = allocate(self.distribution, shapes, self.sparsity, scores)
        return {name: self.pattern.reachable(shapes[name], keep) for name, keep in keeps.items()}


def plan_budget(
    names: Iterable[str],
    sparsity: float | Mapping[str, float] | None,
    pattern: Pattern,
    distribution: Distribution | None = None,
) -> Budget:
    """Check that sparsity, pattern and distribution go together.

    Args:
        names: Parameter names of the layers.
        sparsity: Fraction removed; or ``{glob: sparsity}``, where the first glob that matches a layer counts and layers
            matched by none get no mask; None with an N:M pattern: its own.
        pattern: Which positions compete.
        distribution: How one sparsity is divided over layers; None: every layer gets it.

    Raises:
        TypeError: If sparsity is no number.
        ValueError: If it is out of range, a glob matches nothing, a name is unknown, or the combination is impossible:
            a distribution with a mapping or with N:M, another sparsity than N:M's own.

    Example:
        >>> plan_budget(["fc1.weight"], None, NM(2, 4)).keeps({"fc1.weight": torch.Size([8, 16])})
        {'fc1.weight': 64}
    """
    names = list(names)
    if isinstance(distribution, Mapping):
        raise TypeError("give {glob: sparsity} as the sparsity, not as the distribution")
    if isinstance(distribution, str):
        allocations[distribution]
    elif distribution is not None and not callable(distribution):
        raise TypeError(
            f"distribution must be a name or a function, got {distribution!r}; names: {', '.join(allocations)}"
        )
    if isinstance(pattern, NM) and distribution is not None:
        raise ValueError(
            f"{pattern.n}:{pattern.m} keeps {pattern.n} of {pattern.m} in every layer, so there is nothing for "
            f"distribution={distribution!r} to divide; leave the distribution out, or use another pattern"
        )
    if sparsity is None:
        if not isinstance(pattern, NM):
            raise TypeError(
                "sparsity=None goes with an N:M pattern only, which has its own; give the fraction to remove, e.g. 0.5"
            )
        sparsity = pattern.sparsity
    if isinstance(sparsity, Mapping):
        if distribution is not None:
            raise ValueError(
                f"a sparsity per layer leaves distribution={distribution!r} nothing to divide; "
                "give either one sparsity with a distribution or a sparsity per layer"
            )
        each = match_sparsities(sparsity, names)
    else:
        each = dict.fromkeys(names, check_sparsity(sparsity))
    if isinstance(pattern, NM):
        for one in set(each.values()):
            pattern.keep_for((1, pattern.m), one)  # another sparsity than its own is an error
    return Budget(pattern, each, distribution, None if isinstance(sparsity, Mapping) else sparsity)
