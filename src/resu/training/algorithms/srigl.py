"""SRigL: RigL with a constant fan-in, and neurons that are given up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from resu.core.counting import top_k_mask, top_k_rows
from resu.core.pattern import Pattern, Unstructured
from resu.training.algorithms.base import Algorithm, View, algorithms
from resu.training.algorithms.drop_grow import (
    check_fraction,
    check_init,
    drop_fraction,
    finite_growth,
    initial_scores,
    moved_count,
    moves_at,
    standing_scores,
    without_exchange,
)

__all__ = ["SRigL"]


@algorithms.register("srigl")
@dataclass(frozen=True, kw_only=True)
class SRigL(Algorithm):
    """Structured RigL (SRigL; Lasby et al., arXiv 2305.02299, §3): constant fan-in with neuron ablation.

    As RigL, with every neuron (output row) that is not ablated holding as many weights as the others, to one. At an
    update the ``k = floor(f(t)·n)`` smallest active |w| of the layer are dropped. *Salient* are the survivors and the k
    positions of largest ``|∂L/∂(M⊙W)|`` among the pruned; a neuron with fewer than ``max(1, ablation · fan-in)``
    salient weights loses all its weights, and its share goes to the others. Each row is then filled up to the fan-in by
    gradient.

    Cost: as RigL. The constant fan-in is what condensed kernels want. Fails: on output layers, whose neurons
    are classes (exclude them, as the authors' code does); at low sparsity ablation narrows layers that need their
    width; 0 turns it off. Differs from the authors' code: where the budget does not divide evenly the first rows hold
    one weight more, so that the layer's count is exact; salient by gradient are pruned positions alone, as in the
    paper; what is lost with a neuron is grown by gradient elsewhere, not kept by weaker weights.

    Args:
        alpha: Fraction of active weights dropped at the first update.
        ablation: γ_sal, the fraction of the fan-in that must be salient; 0: no neuron is given up.
        init: First mask: ``"random"``, or ``"magnitude"`` for a trained network.

    Example:
        >>> SRigL(sparsity=0.9, end_step=1000).refuses(Unstructured("tensor")) is None
        False
    """

    alpha: float = 0.3
    ablation: float = 0.3
    init: str = "random"

    gradient: ClassVar[Literal["none", "active", "dense"]] = "dense"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self.alpha, "alpha")
        check_fraction(self.ablation, "ablation")
        check_init(self.init)

    def due(self, step: int) -> bool:
        """At the start, then every interval before the end."""
        return moves_at(self, step)

    def refuses(self, pattern: Pattern) -> str | None:
        """Constant fan-in is the row pattern."""
        if pattern != Unstructured("row"):
            return f"SRigL keeps a constant fan-in per output row: use pattern='row', not {str(pattern)!r}"
        return None

    def violations(self, mask: Tensor, pattern: Pattern) -> int:
        """Rows whose fan-in is not that of the others; neurons given up have none."""
        rows = mask.flatten(1)
        return pattern.violations(rows[rows.any(dim=1)])

    def scores(self, view: View) -> Tensor:
        """|w| of active weights."""
        return standing_scores(view, self.init)

    def update_mask(self, view: View, sparsity: float, step: int) -> Tensor:
        """Drop by magnitude, give up neurons, fill up by gradient."""
        if view.step == 0:
            return view.pattern.select(initial_scores(view, self.init), view.keep)
        if view.gradient is None:
            return without_exchange(view)
        count = moved_count(drop_fraction(self.alpha, step, self.end_step), view.keep)
        growth = finite_growth(view.gradient.abs().flatten(1))
        mask, size = view.mask.flatten(1), view.weight.abs().flatten(1)
        active = int(torch.count_nonzero(mask))
        survivors = top_k_mask(size.masked_fill(~mask, -torch.inf), min(active, max(0, view.keep - count)))
        wanted = top_k_mask(growth.masked_fill(mask, -torch.inf), min(count, mask.numel() - active))
        counts = self._fan_in(survivors | wanted, view.keep)
        rank = size.masked_fill(~survivors, -torch.inf)
        kept = top_k_rows(rank, torch.minimum(counts, survivors.sum(1).cpu()))
        return top_k_rows(growth.masked_fill(kept, torch.inf), counts).view(view.mask.shape)

    def _fan_in(self, salient: Tensor, keep: int) -> Tensor:
        """Weights per row: 0 for ablated neurons, the budget in equal parts for the others."""
        rows, width = salient.shape
        amount = salient.sum(1).cpu()
        least = max(1.0, self.ablation * keep / rows) if self.ablation else 0.0
        alive = amount >= least
        # The others must be able to hold what is left: the most salient neurons stay in any case.
        needed = -(-keep // width)
        if int(alive.sum()) < needed:
            alive = top_k_mask(amount, needed)
        each, extra = divmod(keep, int(alive.sum()))
        counts = torch.zeros(rows, dtype=torch.int64)
        counts[alive] = each
        counts[alive.nonzero().view(-1)[:extra]] += 1
        return counts
