"""What a user asked for, checked as a whole: one sparsity or several, a pattern, a division over the layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from resu.core.counting import check_sparsity
from resu.core.layers import Layer
from resu.core.pattern import NM, Block, Pattern
from resu.pruning.allocation import Allocation, allocate, allocations, match_sparsities, needs_scores

__all__ = ["Budget", "check_request", "check_stacks", "plan_budget", "stack_rows"]

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


def check_request(
    sparsity: float | Mapping[str, float] | None, pattern: Pattern, distribution: Distribution | None = None
) -> float | Mapping[str, float]:
    """The sparsity that was asked for, where it goes together with the pattern and the distribution.

    Args:
        sparsity: Fraction removed; or ``{glob: sparsity}``; None with an N:M pattern: its own.
        pattern: Which positions compete.
        distribution: How one sparsity is divided over layers; None: every layer gets it.

    Raises:
        TypeError: If sparsity is no number.
        ValueError: If it is out of range, a name is unknown, or the combination is impossible: a distribution with a
            mapping or with N:M, another sparsity than N:M's own.

    Example:
        >>> check_request(None, NM(1, 4))
        0.75
    """
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
        return pattern.sparsity
    if isinstance(sparsity, Mapping):
        if distribution is not None:
            raise ValueError(
                f"a sparsity per layer leaves distribution={distribution!r} nothing to divide; "
                "give either one sparsity with a distribution or a sparsity per layer"
            )
        for glob, value in sparsity.items():
            check_sparsity(value, f"sparsity of {glob!r}")
    else:
        check_sparsity(sparsity)
    if isinstance(pattern, NM):
        for value in sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]:
            pattern.keep_for((1, pattern.m), value)  # another sparsity than its own is an error
    return sparsity


def stack_rows(layers: Mapping[str, Layer]) -> dict[str, int]:
    """``{name: rows of each matrix}`` of the layers that are stacks of matrices (fused experts)."""
    return {
        name: layer.matrix(layer.weight).shape[0] // layer.weight.shape[0]
        for name, layer in layers.items()
        if layer.stacked
    }


def check_stacks(pattern: Pattern, stacks: Mapping[str, int]) -> None:
    """Raise where blocks would span two matrices of a stack, which is seen as ``[experts*out, in]``.

    Args:
        pattern: Which positions compete.
        stacks: ``{name: rows of each matrix}``, see :func:`stack_rows`.

    Raises:
        ValueError: On a block whose height does not divide the rows; the allowed heights are named.

    Example:
        >>> check_stacks(Block(4, 1), {"experts.up_proj": 16})
    """
    if not isinstance(pattern, Block):
        return
    for name, rows in stacks.items():
        if rows % pattern.h:
            allowed = ", ".join(str(h) for h in range(1, rows + 1) if rows % h == 0)
            raise ValueError(
                f"{name!r} is a stack of matrices (experts) of {rows} rows each, and blocks of {pattern.h} rows would "
                f"span two of them; use a height that divides {rows} ({allowed}), or exclude it"
            )


def plan_budget(
    names: Iterable[str],
    sparsity: float | Mapping[str, float] | None,
    pattern: Pattern,
    distribution: Distribution | None = None,
    stacks: Mapping[str, int] | None = None,
) -> Budget:
    """A budget for these layers, of what :func:`check_request` lets through.

    Args:
        names: Parameter names of the layers.
        sparsity: As there; of ``{glob: sparsity}`` the first glob that matches a layer counts, and layers matched by
            none get no mask.
        pattern: Which positions compete.
        distribution: How one sparsity is divided over layers; None: every layer gets it.
        stacks: ``{name: rows of each matrix}`` of layers that are seen as ``[experts*out, in]``, such as
            :func:`stack_rows` gives it.

    Raises:
        TypeError: As :func:`check_request`.
        ValueError: As :func:`check_request`; on a glob that matches nothing; on blocks that would span two matrices of
            a stack.

    Example:
        >>> plan_budget(["fc1.weight"], None, NM(2, 4)).keeps({"fc1.weight": torch.Size([8, 16])})
        {'fc1.weight': 64}
    """
    names = list(names)
    asked = check_request(sparsity, pattern, distribution)
    if isinstance(asked, Mapping):
        budget = Budget(pattern, match_sparsities(asked, names), distribution)
    else:
        budget = Budget(pattern, dict.fromkeys(names, asked), distribution, asked)
    check_stacks(pattern, {name: rows for name, rows in (stacks or {}).items() if name in budget.sparsities})
    return budget
