"""Which weights have no effect on the outputs, so that no comparison of outputs can tell whether a removal is right.

A softmax over one token, as an example of one token gives it, hides queries and keys; with two tokens the scale of the
scores would count, and a removal that spoils it would show.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from resu.pruning.structured.groups import Group, Place
from resu.pruning.structured.removal import mask_tensors
from resu.pruning.structured.running import add_noise, differentiable_outputs, double_copy, normal_like, random_like
from resu.pruning.structured.slots import slots
from resu.pruning.structured.training import seeded
from resu.pruning.structured.verify import compare

__all__ = ["without_effect"]

# Shares of noise on the weights, one draw each: a unit behind a ReLU is silent at half of them, and some at any input.
_DRAWS = (0.1, 0.3, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0)

Suspects = dict[str, list[Place]]


def without_effect(model: nn.Module, groups: Mapping[str, Group], inputs: Any, *, seed: int = 0) -> list[str]:
    """The groups with a weight whose units can all be zeroed while no output changes, with noise on all weights.

    Backward passes say which have no gradient, and only of those is it tried.

    Args:
        model: Not changed.
        groups: By name, found in the model.
        inputs: Example inputs, taken as they are and drawn anew.
        seed: Of inputs and noise.
    """
    generator = torch.Generator().manual_seed(seed)
    suspects: Suspects = {name: [*group.places] for name, group in groups.items()}
    with seeded(seed):
        for index, share in enumerate(_DRAWS):  # as given first: drawn anew, a mask may hide what it is put on
            whole, drawn = double_copy(model), random_like(inputs, generator if index % 2 else None)
            add_noise(whole, generator, share)
            suspects = _without_gradient(whole, groups, suspects, drawn, generator)
            if not suspects:
                return []
        found = []
        for name, places in suspects.items():
            silenced = double_copy(whole)
            for place in places:
                _silence(silenced, place, groups[name].places[place])
            if compare(whole, silenced, drawn):
                found.append(name)
    return found


def _without_gradient(
    model: nn.Module, groups: Mapping[str, Group], suspects: Suspects, inputs: Any, generator: torch.Generator
) -> Suspects:
    """Those of the weights whose units have no gradient; all of them where the model cannot be differentiated."""
    weights = {name: slot.tensor.requires_grad_() for name, slot in slots(model).items() if _is_weight(slot.tensor)}
    try:
        outputs = differentiable_outputs(model, inputs)
        random = [normal_like(out, generator) for out in outputs]
        grads = torch.autograd.grad(outputs, list(weights.values()), random, allow_unused=True)
    except Exception:  # whatever a model may raise that was not written to be differentiated
        return suspects
    moves = dict(zip(weights, grads, strict=True))

    def still(group: str, place: Place) -> bool:
        name, dim = place
        grad = moves.get(name)
        if grad is None:
            return name in moves
        return not bool(grad.index_select(dim, groups[group].places[place].reshape(-1).to(grad.device)).any())

    left = {group: [place for place in places if still(group, place)] for group, places in suspects.items()}
    return {group: places for group, places in left.items() if places}


def _silence(model: nn.Module, place: Place, indices: Tensor) -> None:
    name, dim = place
    kept = torch.ones(slots(model)[name].tensor.shape[dim], dtype=torch.bool, device="cpu")
    kept[indices.reshape(-1)] = False
    mask_tensors(model, {name: {dim: kept.nonzero().view(-1)}})


def _is_weight(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and (tensor.is_floating_point() or tensor.is_complex()) and tensor.ndim > 1
