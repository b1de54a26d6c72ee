"""What becomes of one layer: its mask, and its weights where they are updated, from its statistics and its count."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resu.core.counting import check_finite
from resu.core.layers import Layer
from resu.core.pattern import NM, Pattern, Unstructured
from resu.core.randomness import derived_generator
from resu.pruning.dsnot import dsnot
from resu.pruning.importance import importances
from resu.pruning.importance.layers import score_layer
from resu.pruning.sparsegpt import reconstruct, sparsegpt
from resu.pruning.statistics import Stats

__all__ = ["Decision", "Recipe", "apply_decision", "decide", "layer_scores"]


@dataclass(frozen=True)
class Recipe:
    """How layers are pruned.

    Attributes:
        method: Name of a registered importance; ``"sparsegpt"`` is the solver, which updates the weights as it goes.
        pattern: Which positions compete.
        refine: None or ``"dsnot"``.
        update: None or ``"sparsegpt"``.
        seed: Of random scores.
    """

    method: str
    pattern: Pattern
    refine: str | None = None
    update: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        importances[self.method]  # an unknown name is an error that lists the known ones
        if self.refine not in (None, "dsnot"):
            raise ValueError(f"refine is None or 'dsnot', got {self.refine!r}")
        if self.update not in (None, "sparsegpt"):
            raise ValueError(f"update is None or 'sparsegpt', got {self.update!r}")
        if self.refine and not isinstance(self.pattern, (Unstructured, NM)):
            raise ValueError(
                f"refine='dsnot' swaps single weights and would break the pattern {self.pattern}; leave refine out, or "
                "use an unstructured or N:M pattern"
            )

    @property
    def solved(self) -> bool:
        """Whether the solver chooses the mask."""
        return self.method == "sparsegpt"

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that pruning a layer takes, of ``"inputs"``, ``"hessian"`` and ``"grads"``."""
        needs = set(importances[self.method].needs)
        if self.refine:
            needs.add("inputs")
        if self.update or self.solved:
            needs.add("hessian")
        return frozenset(needs)


@dataclass(frozen=True)
class Decision:
    """A mask and weights in matrix shape (:meth:`resu.core.layers.Layer.matrix`), and what there is to say of them.

    Attributes:
        mask: Bool.
        weight: Of the weight's dtype, exactly 0 where pruned.
        notes: ``damping`` of the solver; ``error``, ``‖(W-Ŵ)X‖ / ‖WX‖`` over the calibration inputs, where a Hessian or
            norms give it (``error_from``: from norms alone, inputs count as uncorrelated).
    """

    mask: Tensor
    weight: Tensor
    notes: dict[str, Any]


def layer_scores(recipe: Recipe, layer: Layer, stats: Stats) -> Tensor:
    """Scores of a layer in matrix shape, checked to be finite."""
    seen = dataclasses.replace(stats, generator=derived_generator(recipe.seed, layer.name))
    scores = score_layer(importances[recipe.method], layer, seen)
    check_finite(scores, f"scores of {layer.name!r}")
    return scores


@torch.no_grad()
def decide(recipe: Recipe, layer: Layer, stats: Stats, keep: int, given: Tensor | None = None) -> Decision:
    """Mask and new weights of ``layer``, which is not changed.

    Args:
        recipe: How.
        layer: The layer.
        stats: What :attr:`Recipe.needs` names.
        keep: How many weights stay.
        given: A mask in matrix shape that is chosen already; refined and updated as the recipe says.

    Raises:
        ValueError: On NaN or infinite weights or statistics; the layer is named.
    """
    weight = layer.matrix(layer.weight.detach())
    check_finite(weight, repr(layer.name))
    if keep == weight.numel():
        return Decision(torch.ones_like(weight, dtype=torch.bool), weight, {})
    notes: dict[str, Any] = {}
    try:
        if given is not None:
            mask, new = given.to(weight.device), None
        elif recipe.solved:
            assert stats.hessian is not None
            solved = sparsegpt(weight, stats.hessian, pattern=recipe.pattern, keep=keep)
            mask, new = solved.mask, solved.weight
            notes["damping"] = solved.damping
        else:
            mask = recipe.pattern.select(layer_scores(recipe, layer, stats), keep).to(weight.device)
            new = None
        if recipe.refine:
            assert stats.input_norm is not None
            assert stats.input_mean is not None
            mean, norm = stats.input_mean, stats.input_norm
            mask = dsnot(weight, mask, input_mean=mean, input_norm=norm, pattern=recipe.pattern)
            new = None
        if new is None and (recipe.update or recipe.solved):
            assert stats.hessian is not None
            solved = reconstruct(weight, stats.hessian, mask)
            new, notes["damping"] = solved.weight, solved.damping
    except ValueError as error:
        text = str(error)
        raise ValueError(text if repr(layer.name) in text else f"{layer.name!r}: {text}") from None
    new = torch.where(mask, weight if new is None else new, 0)  # not a product: -0.0 would survive
    return Decision(mask, new, notes | _error(weight, new, stats))


@torch.no_grad()
def apply_decision(layer: Layer, decision: Decision) -> Tensor:
    """Write the new weights in place, so that ties stay tied; the mask in the weight's own shape."""
    layer.weight.copy_(layer.unmatrix(decision.weight))
    return layer.unmatrix(decision.mask)


def _error(weight: Tensor, new: Tensor, stats: Stats) -> dict[str, Any]:
    """``‖(W-Ŵ)X‖ / ‖WX‖``: exact from H, and from norms as if inputs were uncorrelated."""
    if stats.hessian is None and stats.input_norm is None:
        return {}
    change, total = _energy(weight - new, stats), _energy(weight, stats)
    if not total > 0:
        return {}
    return {"error": (max(change, 0.0) / total) ** 0.5, "error_from": "norms" if stats.hessian is None else "hessian"}


def _energy(weight: Tensor, stats: Stats) -> float:
    if stats.hessian is not None:
        hessian = stats.hessian.reshape(-1, *stats.hessian.shape[-2:])
        wide = torch.promote_types(hessian.dtype, torch.float32)
        rows = weight.to(wide).reshape(hessian.shape[0], -1, hessian.shape[-1])
        return float((rows @ hessian.to(rows.device)).mul_(rows).sum(dtype=torch.float64))
    assert stats.input_norm is not None
    wide = torch.promote_types(stats.input_norm.dtype, weight.dtype)
    return float((weight.to(wide) * stats.input_norm.to(weight.device)).square().sum(dtype=torch.float64))
