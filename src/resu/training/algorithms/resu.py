"""Dormant resurrection: values at pruned positions keep learning and compete to come back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from resu.core.counting import check_sparsity
from resu.core.schedule import check_steps
from resu.training.algorithms.base import Algorithm, View, algorithms, ramp

__all__ = ["RESU"]


@algorithms.register("resu")
@dataclass(frozen=True, kw_only=True)
class RESU(Algorithm):
    """Dormant resurrection (RESU) beside an unchanged training loop.

    θ lives at pruned positions. It is trained by the gradient of the *masked* forward, ``∂L/∂W_eff`` with
    ``W_eff = M⊙W``, through whatever optimizer the loop uses: after each step ``θ += γ·Δ`` with Δ the optimizer's
    update there. It takes no part in the forward. Every ``interval`` steps a tournament over |W| and |θ| sets the
    mask; a readmitted position gets its θ as weight, a dropped one keeps its weight as θ. From ``end_step`` on the
    mask is frozen, θ is gone, and training is ordinary masked training.

    Relatives: γ=1 with ``interval=16`` is dynamic pruning with feedback (Lin et al., arXiv 2006.07253); γ=1 with
    ``interval=1``, one shot and no ``end_step`` is straight-through training. ``docs/honest.md`` compares them.

    While θ learns, ``weight.grad`` is dense: a gradient norm taken of it (clipping) covers pruned positions too.

    Give ``end_step``: about 0.85 of the run. Without it the mask never settles. A step costs what
    masked training costs on dense hardware plus, when due, one selection over all weights
    (``benchmarks/bench_sparsifier.py``); θ is one more value per weight.

    Args:
        initial_sparsity: Sparsity at ``begin_step``, where the cubic ramp starts. None (or ``sparsity``) prunes in one
            shot, which is best for a trained network; 0 is for training from scratch.
        ramp_end_step: Where the ramp reaches the final sparsity; None: at ``end_step``.
        gamma: Factor γ on θ's update, > 0. None: 2 in one shot, 1 with a ramp.
        fresh_state: Zero the optimizer's state at positions that change sides (the contract of every other rule). False
            lets momenta go on: a position trains on both sides of the mask. None: True in one shot, False with a ramp.

    Example:
        >>> rule = RESU(sparsity=0.9, ramp_end_step=500, end_step=800)
        >>> rule.target(500), rule.learning(799), rule.learning(800), rule.gamma
        (0.9, True, False, 1.0)
        >>> RESU(sparsity=0.9, initial_sparsity=None, end_step=700).gamma
        2.0
    """

    interval: int = 1
    initial_sparsity: float | None = 0.0
    ramp_end_step: int | None = None
    gamma: float | None = None
    fresh_state: bool | None = None

    learns_pruned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(ramp_end_step=self.ramp_end_step)
        if self.initial_sparsity is not None:
            check_sparsity(self.initial_sparsity, "initial_sparsity")
            if self.initial_sparsity > self.sparsity:
                raise ValueError(
                    f"initial_sparsity {self.initial_sparsity} is above the final sparsity {self.sparsity}"
                )
        no_ramp = self.ramp_end_step is None and self.end_step is None
        one_shot = no_ramp or self.initial_sparsity in (None, self.sparsity)
        # Resolved here, so that a saved state names the values that were used.
        if self.gamma is None:
            object.__setattr__(self, "gamma", 2.0 if one_shot else 1.0)
        if self.fresh_state is None:
            object.__setattr__(self, "fresh_state", one_shot)
        if not (self.damping > 0.0 and math.isfinite(self.damping)):
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
        return bool(self.fresh_state)

    @property
    def damping(self) -> float:
        """γ."""
        assert self.gamma is not None
        return self.gamma

    def target(self, step: int) -> float:
        """The ramp's value; 0 before it begins."""
        if step < self.begin_step:
            return 0.0
        initial = self.sparsity if self.initial_sparsity is None else self.initial_sparsity
        end = self.end_step if self.ramp_end_step is None else self.ramp_end_step
        return ramp(initial, self.sparsity, self.begin_step, end)(step)

    def learning(self, step: int) -> bool:
        """From the first tournament until the mask is frozen."""
        return step >= self.begin_step and (self.end_step is None or step < self.end_step)

    def scores(self, view: View) -> Tensor:
        """|W| at active and |θ| at pruned positions."""
        # Their supports are disjoint, so the sum is the one that is there.
        value = view.weight if view.theta is None else view.weight + view.theta
        return value.abs()
