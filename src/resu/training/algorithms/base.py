"""What a topology rule is, and what it may look at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

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

    Attributes:
        name: Parameter name.
        weight: Effective weight M⊙W (pruned positions are 0), ``[out, in…]``.
        mask: Bool, True = active.
        keep: How many positions the new mask keeps (the allocation's integer).
        generator: CPU generator derived from (seed, name, step): equal on every rank and after a resume.
        pattern: Which positions compete.
        theta: Values at pruned positions (0 at active ones), for rules with ``learns_pruned``.
    """

    name: str
    weight: Tensor
    mask: Tensor
    keep: int
    generator: torch.Generator
    pattern: Pattern = field(default_factory=Unstructured)
    theta: Tensor | None = None


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

    def target(self, step: int) -> float:
        """Sparsity at ``step``."""
        return self.sparsity

    def due(self, step: int) -> bool:
        """Whether the topology is updated at ``step``."""
        return Every(self.interval, self.begin_step, self.end_step)(step)

    def learning(self, step: int) -> bool:
        """Whether the optimizer step after ``step`` also learns values at pruned positions."""
        return False

    @abstractmethod
    def scores(self, view: View) -> Tensor:
        """Importance of every position (higher = keep); also what a global allocation compares."""

    def update_mask(self, view: View, sparsity: float, step: int) -> Tensor:
        """The mask from ``step`` on: by default the ``view.keep`` best scores under the pattern."""
        return view.pattern.select(self.scores(view), view.keep)


def ramp(initial: float, final: float, begin_step: int, end_step: int | None) -> Schedule:
    """The cubic ramp of gradual pruning, or a constant where there is nothing to ramp."""
    check_sparsity(initial, "initial_sparsity")
    if end_step is None or initial == final:
        return Constant(final)
    return Cubic(initial, final, begin_step, end_step)
