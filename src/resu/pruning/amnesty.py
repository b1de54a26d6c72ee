"""Amnesty: how many trained θ may come back at the end of a resurrection cycle, and which.

The places of the new mask are divided between two groups before anyone competes: positions that were pruned get
at most a share ``r`` of them, positions that were active the rest. Each group is ranked by itself, so a small θ
does not have to beat a large active weight to be tried.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from resu.core.counting import check_finite, keep_count, positions, top_k_mask
from resu.core.mask import SparseMask
from resu.core.optimizer_state import clear_state
from resu.pruning.importance import Stats, importances

__all__ = ["Amnesty", "AmnestyConfig"]

# Names of api and papers to registered importances: here "gradient" is |w·g|.
_SCORES = {"magnitude": "magnitude", "gradient": "taylor", "wanda": "wanda"}


@dataclass(frozen=True)
class AmnestyConfig:
    """Settings of the tournament.

    Args:
        r_start: Share of the kept places that resurrected positions may take in the first cycle.
        r_end: That share in the last cycle.
        total_cycles: Number of cycles.
        score_type: ``"magnitude"`` (``|w|``), ``"gradient"`` (``|w·g|``) or ``"wanda"`` (``|w|·‖x‖``).

    Raises:
        ValueError: On a share outside [0, 1], no cycles, or an unknown score type.
    """

    r_start: float = 0.10
    r_end: float = 0.02
    total_cycles: int = 5
    score_type: str = "magnitude"

    def __post_init__(self) -> None:
        for name in ("r_start", "r_end"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)!r}")
        if self.total_cycles < 1:
            raise ValueError(f"total_cycles must be at least 1, got {self.total_cycles!r}")
        if self.score_type not in _SCORES:
            raise ValueError(f"unknown score_type {self.score_type!r}; known: {', '.join(_SCORES)}")

    @property
    def importance(self) -> str:
        """The registered importance that ``score_type`` stands for (``"gradient"`` is ``"taylor"``)."""
        return _SCORES[self.score_type]


class Amnesty:
    """The tournament that decides at commit which positions the new mask keeps.

    Args:
        config: Its settings.

    Example:
        >>> amnesty = Amnesty(AmnestyConfig(r_start=0.5, r_end=0.1, total_cycles=4))
        >>> [round(amnesty.resurrection_budget(c), 2) for c in (0, 2, 4)]
        [0.5, 0.3, 0.1]
        >>> old = torch.tensor([True, True, True, False, False, False])
        >>> scores = torch.tensor([3.0, 2.0, 1.0, 9.0, 8.0, 7.0])
        >>> amnesty.relative_tournament(scores, old, target_sparsity=0.4, cycle=0)  # 4 places, 2 of them open
        tensor([ True,  True, False,  True,  True, False])
    """

    def __init__(self, config: AmnestyConfig | None = None) -> None:
        self.config = config or AmnestyConfig()

    def resurrection_budget(self, cycle: int) -> float:
        """``r(c) = r_start - (r_start - r_end)·c/C``; ``r_end`` from the last cycle on.

        Raises:
            ValueError: On a negative cycle.
        """
        if cycle < 0:
            raise ValueError(f"cycle must be at least 0, got {cycle!r}")
        config = self.config
        done = min(cycle, config.total_cycles) / config.total_cycles
        return config.r_start - (config.r_start - config.r_end) * done

    def compute_scores(
        self, weight: Tensor, grad: Tensor | None = None, activation_norms: Tensor | None = None
    ) -> Tensor:
        """Scores of the effective weight by ``config.score_type``; of the weight's shape, higher = keep.

        Args:
            weight: ``W_eff = M⊙W + Φ(θ)``, ``[out, in…]``.
            grad: ``∂L/∂W_eff``, for ``"gradient"``.
            activation_norms: Per input, for ``"wanda"``.

        Raises:
            ValueError: If what the score type needs is missing.
        """
        return importances[self.config.importance](weight, Stats(grad=grad, input_norm=activation_norms))

    def relative_tournament(
        self, scores: Tensor, old_mask: Tensor | SparseMask, target_sparsity: float, cycle: int
    ) -> Tensor:
        """The new mask at ``target_sparsity``: an exact count, each group ranked by itself.

        Args:
            scores: Higher = keep, any shape, finite.
            old_mask: Bool (or SparseMask) of that shape, True = was active.
            target_sparsity: In [0, 1).
            cycle: Which cycle ends.

        Returns:
            Bool mask of the shape of ``scores``; ties keep the lower index.
        """
        return self.tournament(scores, old_mask, keep_count(scores.numel(), target_sparsity), cycle)

    def tournament(self, scores: Tensor, old_mask: Tensor | SparseMask, keep: int, cycle: int) -> Tensor:
        """Like :meth:`relative_tournament` with the number of places given.

        The resurrected get ``min(round(r·keep), p)`` places, the active the rest; what one group cannot fill
        goes to the other.
        """
        old = old_mask.mask if isinstance(old_mask, SparseMask) else old_mask
        if old.dtype != torch.bool or old.shape != scores.shape:
            raise ValueError(
                f"old_mask must be bool of the scores' shape {tuple(scores.shape)}, got {old.dtype} {tuple(old.shape)}"
            )
        if not 0 <= keep <= scores.numel():
            raise ValueError(f"cannot keep {keep} of {scores.numel()} positions")
        check_finite(scores, "scores")
        n_active = int(old.sum())
        wanted = min(round(self.resurrection_budget(cycle) * keep), old.numel() - n_active)
        resurrected = keep - min(keep - wanted, n_active)
        new = torch.zeros_like(old).view(-1)
        for group, places in ((old, keep - resurrected), (~old, resurrected)):
            index = positions(group)
            new[index[top_k_mask(scores.detach().reshape(-1)[index], places)]] = True
        return new.view(old.shape)

    def commit_with_amnesty(
        self,
        layer: Any,
        target_sparsity: float,
        cycle: int,
        *,
        optimizer: Optimizer | None = None,
        grad: Tensor | None = None,
        activation_norms: Tensor | None = None,
    ) -> dict[str, float]:
        """End the resurrection of ``layer``: merge θ, choose the new mask, prune to it exactly.

        Args:
            layer: A resurrection layer in a mode with θ (``RESULinear``, ``RESUConv2d``).
            target_sparsity: Of this layer, exact to one weight.
            cycle: Which cycle ends.
            optimizer: Its state at every position that changed sides is cleared.
            grad: Gradient of the merged weight at every position; the ``"gradient"`` score needs it. What the layer
                holds is no substitute: in RESU mode ``layer.weight.grad`` is zero at active positions, which are
                frozen, and in the quantized modes there is a gradient of θ alone.
            activation_norms: For the ``"wanda"`` score; by default ``layer.activation_norms``.

        Returns:
            ``n_resurrected`` and ``n_active_kept`` (kept positions that were pruned, or active, before),
            ``resurrection_budget`` (share of the places open to the resurrected) and ``resurrection_rate``
            (resurrected / pruned before). The layer is sparse afterwards (dense if everything is kept), and
            positions outside the new mask are +0.0.

        Raises:
            ValueError: If the layer has no θ, or what the score needs is missing; the layer is unchanged then.
        """
        mode = getattr(getattr(layer, "mode", None), "name", None)
        old = layer.mask if mode in ("RESU", "QRESU", "QRESU_SELECTIVE") else None
        if not isinstance(old, SparseMask):
            raise ValueError(
                f"commit_with_amnesty needs a layer in a resurrection mode, got {type(layer).__name__} in mode {mode}"
            )
        weight = layer.effective_weight().detach()
        if self.config.score_type == "gradient" and grad is None:
            raise ValueError(
                f"score_type 'gradient' in mode {mode} needs grad=, the gradient of the merged weight; there is none: "
                "what the layer holds is that of θ alone (active positions are frozen). Take it from a backward pass "
                "of a copy whose layer has left the mode, or use score_type 'magnitude' or 'wanda'"
            )
        if self.config.score_type == "wanda" and activation_norms is None:
            activation_norms = getattr(layer, "activation_norms", None)
        scores = self.compute_scores(weight, grad, activation_norms)
        new = self.relative_tournament(scores, old, target_sparsity, cycle)
        (layer.exit_resu_mode if mode == "RESU" else layer.exit_qresu_mode)(commit=True)
        if bool(new.all()):
            layer.remove_mask()
        else:
            layer.set_mask(SparseMask(new))
        was = old.mask
        if optimizer is not None:
            clear_state(optimizer, layer.weight, was ^ new)
        resurrected = int((new & ~was).sum())
        return {
            "n_resurrected": resurrected,
            "n_active_kept": int((new & was).sum()),
            "resurrection_budget": self.resurrection_budget(cycle),
            "resurrection_rate": resurrected / old.n_pruned if old.n_pruned else 0.0,
        }
