"""What a topology rule is, and what it may look at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from resu.core.counting import check_sparsity
from resu.core.pattern import Pattern, Unstructured
from resu.core.registry import Registry
from resu.core.schedule import Constant, Cubic, Every, Schedule

__all__ = ["Algorithm", "View", "algorithms"]

algorithms: Registry[type[Algorithm]] = Registry("training algorithm")


@dataclass(frozen=True)
class View:
    """One layer at one step, as a rule sees it. A rule reads these tensors and changes none of them.

    All tensors have the shape ``[out, in…]`` and are whole, also where the layer is sharded over ranks.

    Attributes:
        name: Parameter name.
        weight: Effective weight M⊙W (pruned positions are 0).
        mask: Bool, True = active.
        keep: How many positions the new mask keeps (the allocation's integer).
        generator: CPU generator derived from (seed, name, step): equal on every rank and after a resume.
        pattern: Which positions compete.
        step: Optimizer steps done.
        theta: Values at pruned positions (0 at active ones), for rules with ``learns_pruned``.
        gradient: For rules that ask for it (``Algorithm.gradient``), of the step just done: ``∂L/∂(M⊙W)`` at every
            position, fp32, summed over the micro-batches, averaged over ranks, on the scale of what the optimizer was
            given (unscaled, clipped); or what the optimizer was given, at active positions. None before the first step.
        momentum: Exponential mean of the dense gradients, for rules with ``gradient_memory``.
    """

    name: str
    weight: Tensor
    mask: Tensor
    keep: int
    generator: torch.Generator
    pattern: Pattern = field(default_factory=Unstructured)
    step: int = 0
    theta: Tensor | None = None
    gradient: Tensor | None = None
    momentum: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Algorithm(ABC):
    """One topology rule: pure functions of a :class:`View` and the step. The driver does the rest.

    Steps are optimizer steps done so far: 0 is before the first one.

    Args:
        sparsity: Final fraction removed, in [0, 1).
        interval: Steps between topology updates.
        begin_step: First step at which the topology may change.
        end_step: Last one; None: no end.
    """

    sparsity: float
    interval: int = 100
    begin_step: int = 0
    end_step: int | None = None

    #: Whether the optimizer may learn values at pruned positions (they take no part in the forward).
    learns_pruned: ClassVar[bool] = False
    #: What of the gradient an update looks at: nothing, what the optimizer gets at active positions, or all of it.
    gradient: ClassVar[Literal["none", "active", "dense"]] = "none"

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        Every(self.interval, self.begin_step, self.end_step)

    @property
    def damping(self) -> float:
        """Factor on what the optimizer learns at pruned positions, where ``learns_pruned``."""
        return 1.0

    @property
    def clears_state(self) -> bool:
        """Whether optimizer state of positions that change sides is zeroed."""
        return True

    @property
    def gradient_memory(self) -> float | None:
        """β of the exponential mean of dense gradients that the driver keeps for this rule; None: none is kept."""
        return None

    def target(self, step: int) -> float:
        """Sparsity at ``step``."""
        return self.sparsity

    def due(self, step: int) -> bool:
        """Whether the topology is updated at ``step``."""
        return Every(self.interval, self.begin_step, self.end_step)(step)

    def learning(self, step: int) -> bool:
        """Whether the optimizer step after ``step`` also learns values at pruned positions."""
        return False

    def refuses(self, pattern: Pattern) -> str | None:
        """Why this rule cannot keep to a pattern; None: it can."""
        return None

    def violations(self, mask: Tensor, pattern: Pattern) -> int:
        """How many units of a mask, ``[out, in…]``, break the pattern as this rule keeps to it."""
        return pattern.violations(mask)

    @abstractmethod
    def scores(self, view: View) -> Tensor:
        """Importance of every position (higher = keep); also what a global allocation compares."""

    def update_mask(self, view: View, sparsity: float, step: int) -> Tensor:
        """The mask from ``step`` on: by default the ``view.keep`` best scores under the pattern."""
        return view.pattern.select(self.scores(view), view.keep)

    def redistribute(self, views: Mapping[str, View]) -> dict[str, int]:
        """``{name: keep}`` where the rule moves budget between layers; by default what the distribution gave."""
        return {name: view.keep for name, view in views.items()}

    def reach(self, view: View) -> Tensor | None:
        """Where the optimizer may learn, where ``learns_pruned`` (active positions among them); None: everywhere."""
        return None

    def penalty(self, weight: Tensor, theta: Tensor) -> Tensor | None:
        """What is added to the gradient before each optimizer step, where ``learns_pruned``; None: nothing.

        Args:
            weight: M⊙W; of a sharded layer the part that lies here.
            theta: Values at pruned positions, likewise.
        """
        return None


def ramp(initial: float, final: float, begin_step: int, end_step: int | None) -> Schedule:
    """The cubic ramp of gradual pruning, or a constant where there is nothing to ramp."""
    check_sparsity(initial, "initial_sparsity")
    if end_step is None or initial == final:
        return Constant(final)
    return Cubic(initial, final, begin_step, end_step)
