"""Amnesty: a budgeted tournament decides which resurrected weights stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from resu.core.counting import check_finite, keep_count, top_k_mask
from resu.core.mask import SparseMask
from resu.core.optimizer_state import clear_state
from resu.pruning.importance import Stats, importances

__all__ = ["Amnesty", "AmnestyConfig"]

_SCORES = {"magnitude": "magnitude", "gradient": "taylor", "wanda": "wanda"}


@dataclass(frozen=True)
class AmnestyConfig:
    r"""Budget and ranking of the tournament.

    Args:
        r_start: Share of the kept places open to resurrected weights in cycle 0, in [0, 1].
        r_end: The share towards which it falls.
        total_cycles: C in ``r(c) = r_start - (r_start - r_end) c / C``.
        score_type: ``"magnitude"`` (\\|w\\|), ``"gradient"`` (\\|w·g\\|) or ``"wanda"`` (\\|w\\|·‖x‖).
    """

    r_start: float = 0.10
    r_end: float = 0.02
    total_cycles: int = 5
    score_type: str = "magnitude"

    def __post_init__(self) -> None:
        for name in ("r_start", "r_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)!r}")
        if self.total_cycles < 1:
            raise ValueError(f"total_cycles must be at least 1, got {self.total_cycles!r}")
        if self.score_type not in _SCORES:
            raise ValueError(f"score_type must be one of {', '.join(_SCORES)}, got {self.score_type!r}")


class Resurrected(Protocol):
    """What :meth:`Amnesty.commit_with_amnesty` needs of a layer; the RESU layers have it."""

    weight: Any
    mask: Any
    mode: Any

    def exit_resu_mode(self, commit: bool = True) -> None: ...
    def exit_qresu_mode(self, commit: bool = True) -> None: ...
    def set_mask(self, mask: Any) -> None: ...


class Amnesty:
    """The tournament of one run; pure but for :meth:`commit_with_amnesty`.

    Example:
        >>> amnesty = Amnesty(AmnestyConfig(r_start=0.5, r_end=0.0, total_cycles=2))
        >>> scores = torch.tensor([4.0, 3.0, 9.0, 8.0])
        >>> old = torch.tensor([True, True, False, False])
        >>> amnesty.resurrection_budget(0), amnesty.tournament(scores, old, 2, cycle=0).tolist()
        (0.5, [True, False, True, False])
    """

    def __init__(self, config: AmnestyConfig | None = None) -> None:
        self.config = config or AmnestyConfig()

    def resurrection_budget(self, cycle: int) -> float:
        """``r(c)``, the share of kept places open to resurrected weights; r_end beyond the plan."""
        c = self.config
        if cycle < 0:
            raise ValueError(f"cycle must not be negative, got {cycle}")
        return c.r_start - (c.r_start - c.r_end) * min(cycle, c.total_cycles) / c.total_cycles

    def compute_scores(
        self, weight: Tensor, grad: Tensor | None = None, activation_norms: Tensor | None = None
    ) -> Tensor:
        """Scores of the merged weight ``M⊙W + Φ(θ)``, of its shape.

        Args:
            weight: ``[out, in…]``.
            grad: Of the weight's shape; needed by ``"gradient"``.
            activation_norms: Per input column; needed by ``"wanda"``.

        Raises:
            ValueError: If what the score needs is missing.
        """
        stats = Stats(grad=grad, input_norm=activation_norms)
        return importances[_SCORES[self.config.score_type]](weight.detach(), stats)

    def tournament(self, scores: Tensor, old_mask: Tensor, keep: int, cycle: int) -> Tensor:
        """The new mask: ``keep`` places, at most ``round(r·keep)`` of them for formerly pruned positions.

        Each group is ranked by its own scores; places the active group cannot fill go to the other.

        Args:
            scores: Any shape, finite; higher = keep.
            old_mask: Bool, True = was active.
            keep: Exact number of places.
            cycle: For the budget.
        """
        check_finite(scores, "amnesty scores")
        n_pruned = scores.numel() - int(old_mask.sum())
        n_active = scores.numel() - n_pruned
        if not 0 <= keep <= scores.numel():
            raise ValueError(f"cannot keep {keep} of {scores.numel()} positions")
        resurrected = min(round(self.resurrection_budget(cycle) * keep), n_pruned, keep)
        active = min(keep - resurrected, n_active)
        resurrected = keep - active
        low = torch.finfo(torch.float64).min
        values = scores.detach().double()
        was_active = top_k_mask(values.masked_fill(~old_mask, low), active)
        was_pruned = top_k_mask(values.masked_fill(old_mask, low), resurrected)
        return was_active | was_pruned

    def relative_tournament(
        self, scores: Tensor, old_mask: Tensor | SparseMask, target_sparsity: float, cycle: int
    ) -> Tensor:
        """:meth:`tournament` with the exact count of ``target_sparsity``."""
        mask = old_mask.mask if isinstance(old_mask, SparseMask) else old_mask
        return self.tournament(scores, mask, keep_count(scores.numel(), target_sparsity), cycle)

    def commit_with_amnesty(
        self,
        layer: Resurrected,
        target_sparsity: float,
        cycle: int,
        *,
        optimizer: Optimizer | None = None,
        grad: Tensor | None = None,
        activation_norms: Tensor | None = None,
    ) -> dict[str, float]:
        """Merge θ of a RESU layer, hold the tournament, set the new mask.

        Optimizer state of every position that changed sides is cleared.

        Returns:
            ``n_resurrected, n_active_kept, resurrection_budget, resurrection_rate`` (of the pruned positions).
        """
        old: Tensor = layer.mask.mask
        if layer.mode.name == "RESU":
            layer.exit_resu_mode(commit=True)
        else:
            layer.exit_qresu_mode(commit=True)
        scores = self.compute_scores(layer.weight, grad, activation_norms)
        new = self.relative_tournament(scores, old, target_sparsity, cycle)
        layer.set_mask(SparseMask(new))
        if optimizer is not None:
            clear_state(optimizer, layer.weight, old ^ new)
        resurrected, pruned = int((new & ~old).sum()), int((~old).sum())
        return {
            "n_resurrected": resurrected,
            "n_active_kept": int((new & old).sum()),
            "resurrection_budget": self.resurrection_budget(cycle),
            "resurrection_rate": resurrected / pruned if pruned else 0.0,
        }
