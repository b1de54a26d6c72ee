"""The removal itself, the same for channels and for blocks: measured, compared once more, undone if anything fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from resu.pruning.structured.removal import Removal
from resu.pruning.structured.running import double_copy, random_like
from resu.pruning.structured.sizes import count_macs, count_parameters
from resu.pruning.structured.verify import compare

__all__ = ["Removed", "remove_verified"]


@dataclass(frozen=True)
class Removed:
    """A removal that holds.

    Attributes:
        removal: The way back.
        error: Largest difference from the masked model over the largest output, in float64.
        parameters: Before and after.
        macs: Multiply-adds of a pass over the example inputs, before and after.
    """

    removal: Removal
    error: float
    parameters: tuple[int, int]
    macs: tuple[int, int]


def remove_verified(
    model: nn.Module,
    mask: Callable[[nn.Module], object],
    remove: Callable[[nn.Module], Removal],
    example_inputs: Any,
    rtol: float,
) -> Removed:
    """Remove in place, and compare with the masked model on the example inputs; whatever fails is undone.

    Args:
        model: Changed in place.
        mask: ``mask(copy)``, which zeroes in place what is to go.
        remove: ``remove(model)``, which takes it out in place.
        example_inputs: A tensor, a tuple of arguments or a dictionary of keyword arguments.
        rtol: Largest difference allowed, over the largest output.

    Raises:
        ValueError: If the models differ.
    """
    masked = double_copy(model)
    mask(masked)
    before = count_parameters(model), count_macs(model, example_inputs)
    removal = remove(model)
    try:
        check = compare(masked, double_copy(model), random_like(example_inputs, None), rtol)
        if not check:
            raise ValueError(f"the smaller model is not the masked one, so the removal was undone: {check.reason}")
        after = count_parameters(model), count_macs(model, example_inputs)
    except BaseException:
        removal.undo()
        raise
    return Removed(removal, check.error, (before[0], after[0]), (before[1], after[1]))
