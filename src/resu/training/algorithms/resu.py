"""Dormant resurrection: values at pruned positions keep learning and compete to come back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from resu.core.counting import check_sparsity
from resu.training.algorithms.base import Algorithm, View, algorithms, ramp

__all__ = ["RESU"]


@algorithms.register("resu")
@dataclass(frozen=True, kw_only=True)
class RESU(Algorithm):
    r"""Dormant resurrection (RESU) beside an unchanged training loop.

    θ lives at pruned positions. It is trained by the gradient of the *masked* forward, ``∂L/∂W_eff`` with
    ``W_eff = M⊙W``, through whatever optimizer the loop uses, damped by ``gamma``: after each step
    ``θ += γ·Δ`` with Δ the optimizer's update there. It takes no part in the forward. Every ``interval``
    steps a tournament over \\|W\\| and \\|θ\\| sets the mask; a readmitted position gets its θ as weight, a dropped one
    keeps its weight as θ. From ``end_step`` on the mask is frozen, θ is gone, and training is ordinary masked
    training. γ=1 is dynamic pruning with feedback (Lin et al., arXiv 2006.07253); γ=1 with ``interval=1`` is
    straight-through training.

    Give ``end_step`` (two thirds to four fifths of the run is good): without it the mask never settles.
    Costs what masked training costs on dense hardware, plus one value per weight for θ.

    Args:
        initial_sparsity: Sparsity at ``begin_step``; equal to ``sparsity`` (or None) prunes in one shot.
        ramp_end_step: Where the cubic ramp reaches the final sparsity; None: at ``end_step``.
        gamma: Factor on θ's update, > 0; below 1 it damps.
        fresh_state: Zero the optimizer's state at positions that change sides (the contract of every other rule). False
            lets momenta go on: a position trains on both sides of the mask.

    Example:
        >>> rule = RESU(sparsity=0.9, begin_step=0, ramp_end_step=500, end_step=800)
        >>> rule.target(500), rule.learning(799), rule.learning(800)
        (0.9, True, False)
    """

    interval: int = 16
    initial_sparsity: float | None = 0.0
    ramp_end_step: int | None = None
    gamma: float = 0.3
    fresh_state: bool = True

    learns_pruned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial_sparsity is not None:
            check_sparsity(self.initial_sparsity, "initial_sparsity")
            if self.initial_sparsity > self.sparsity:
                raise ValueError(
                    f"initial_sparsity {self.initial_sparsity} is above the final sparsity {self.sparsity}"
                )
        if not (self.gamma > 0.0 and math.isfinite(self.gamma)):
            raise ValueError(f"gamma must be positive and finite, got {self.gamma!r}")
        if self.ramp_end_step is not None:
            last = self.end_step if self.end_step is not None else self.ramp_end_step
            if not self.begin_step <= self.ramp_end_step <= last:
                raise ValueError(
                    f"need begin_step <= ramp_end_step <= end_step, got {self.begin_step}, "
                    f"{self.ramp_end_step}, {self.end_step}"
                )

    @property
    def clears_state(self) -> bool:
        """As ``fresh_state`` says."""
        return self.fresh_state

    def target(self, step: int) -> float:
        """The ramp's value; 0 before it begins."""
        if step < self.begin_step:
            return 0.0
        initial = self.sparsity if self.initial_sparsity is None else self.initial_sparsity
        end = self.end_step if self.ramp_end_step is None else self.ramp_end_step
        return ramp(initial, self.sparsity, self.begin_step, end)(step)

    def learning(self, step: int) -> bool:
        """Until the mask is frozen."""
        return self.end_step is None or step < self.end_step

    def scores(self, view: View) -> Tensor:
        """|W| at active and |θ| at pruned positions."""
        # Their supports are disjoint, so the sum is the one that is there.
        value = view.weight if view.theta is None else view.weight + view.theta
        return value.abs()
