"""Masks from scores, and masks inside masks: what is pruned stays pruned."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from resu.core.counting import check_finite, largest_remainder
from resu.core.pattern import Pattern
from resu.pruning.allocation import Allocation
from resu.pruning.budget import plan_budget

__all__ = ["choose_masks"]


def choose_masks(
    scores: Mapping[str, Tensor],
    sparsity: float | Mapping[str, float],
    pattern: Pattern,
    distribution: str | Allocation | None = None,
    within: Mapping[str, Tensor] | None = None,
    stacks: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """The masks that keep the highest scores, exact in count, and keep nothing that ``within`` has pruned.

    Args:
        scores: ``{name: [out, in…]}``, finite, higher = keep.
        sparsity: Of all positions, those already pruned among them; or ``{glob: sparsity}``, where layers matched by
            none get no mask.
        pattern: Who competes with whom.
        distribution: How one sparsity is divided over the layers; None: every layer gets ``sparsity``.
        within: Earlier masks by name, True = may be kept. A layer that is sparser already stays as it is; where one
            layer has fewer weights left than its share, the others keep the difference.
        stacks: As in :func:`resu.pruning.budget.plan_budget`.

    Returns:
        ``{name: bool mask}`` of the scores' shapes.

    Raises:
        ValueError: On NaN scores, a sparsity the pattern or distribution cannot have, or blocks across matrices of a
            stack.

    Example:
        >>> import torch
        >>> from resu.core.pattern import Unstructured
        >>> scores = {"w": torch.tensor([[4.0, 3.0, 2.0, 1.0]])}
        >>> within = {"w": torch.tensor([[False, True, True, True]])}
        >>> choose_masks(scores, 0.5, Unstructured(), within=within)["w"]
        tensor([[False,  True,  True, False]])
    """
    budget = plan_budget(scores, sparsity, pattern, distribution, stacks)
    scores = {name: scores[name] for name in budget.sparsities}
    for name, score in scores.items():
        check_finite(score, f"scores of {name!r}")
    shapes = {name: score.shape for name, score in scores.items()}
    earlier = {name: mask for name, mask in (within or {}).items() if name in scores}
    keeps = budget.keeps(shapes, _lowered(scores, earlier) if budget.needs_scores else None)
    left = {name: int(earlier[name].sum()) if name in earlier else math.prod(shapes[name]) for name in shapes}
    if distribution is not None:
        keeps = _capped(keeps, left)
    masks = {}
    for name, score in scores.items():
        if name not in earlier:
            masks[name] = pattern.select(score, keeps[name])
            continue
        may = earlier[name].to(score.device)
        if left[name] <= keeps[name] and pattern.violations(may) == 0:
            masks[name] = may.clone()
            continue
        ranked = (score if score.is_floating_point() else score.double()).masked_fill(~may, -math.inf)
        masks[name] = pattern.select(ranked, keeps[name]) & may
    return masks


def _lowered(scores: Mapping[str, Tensor], earlier: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Scores to divide a budget by: what is pruned ranks with the worst. Finite, since budgets add scores up."""
    if not earlier:
        return scores
    lowest = min(0.0, *(float(score.min()) for score in scores.values()))
    return {
        name: score.masked_fill(~earlier[name].to(score.device), lowest) if name in earlier else score
        for name, score in scores.items()
    }


def _capped(keeps: Mapping[str, int], left: Mapping[str, int]) -> dict[str, int]:
    """The same total within what each layer has left."""
    if all(keep <= left[name] for name, keep in keeps.items()):
        return dict(keeps)
    total = sum(keeps.values())
    return dict(left) if total >= sum(left.values()) else largest_remainder(total, keeps, left)
