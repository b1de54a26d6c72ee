"""Whether a smaller model computes what it should: the model with the same channels zeroed.

*Zeroed* means all that is taken out: a channel's row in the layer that makes it, its bias and its entries in norms,
and its columns in the layers that read it. So what a channel would have held (``sigmoid(0)`` is 0.5) makes no
difference: nothing reads it. Norms over channels, softmax over channels and the like do read it, and are found out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from resu.pruning.statistics import eager
from resu.pruning.structured.outputs import Check, comparable, difference
from resu.pruning.structured.removal import Slices, mask_tensors, shrink_tensors
from resu.pruning.structured.running import add_noise, call, cloned, double_copy, in_float64, random_like
from resu.pruning.structured.slots import slots
from resu.pruning.structured.training import differs_in_training, seeded
from resu.pruning.trees import leaves

__all__ = ["Check", "compare", "double_copy", "random_like", "verify_removal", "verify_smaller"]

_ROUNDS = 3  # of two inputs each: at one input alone, half of the channels may be zero behind a ReLU


def compare(reference: nn.Module, shrunk: nn.Module, inputs: Any, rtol: float = 1e-9) -> Check:
    """Whether two models in float64 (:func:`double_copy`) give the same outputs.

    Args:
        reference: The model with what is removed zeroed.
        shrunk: The smaller model.
        inputs: In float64.
        rtol: As in :func:`resu.pruning.structured.outputs.difference`.

    Raises:
        TypeError: If there is no tensor among the outputs, or the reference does not run.
    """
    own, other = cloned(inputs), cloned(inputs)
    before = _versions(reference, own), _versions(shrunk, other)
    with in_float64(), eager(reference), eager(shrunk):
        try:
            wanted = comparable(call(reference, own))
        except Exception as error:
            raise TypeError(
                f"{type(reference).__name__} does not run in float64, so nothing can be verified: "
                f"{' '.join(str(error).split())[:200]}"
            ) from error
        try:
            got = comparable(call(shrunk, other))
        except Exception as error:  # whatever a model may raise that does not fit together any more
            return Check(float("inf"), f"it does not run: {' '.join(str(error).split())[:200]}")
    left_alone = {name for name, version in _versions(reference, own).items() if version == before[0].get(name)}
    for name, version in _versions(shrunk, other).items():
        if version != before[1].get(name, version) and name in left_alone:
            return Check(float("inf"), f"it writes into {name} in place, which the masked model leaves alone")
    if not wanted:
        raise TypeError(f"{type(reference).__name__} returns no tensor that could be compared")
    return difference(wanted, got, rtol)


def verify_removal(
    model: nn.Module,
    slices: Slices,
    example_inputs: Any,
    *,
    shrink: Callable[[nn.Module], object] | None = None,
    rtol: float = 1e-9,
    seed: int = 0,
) -> Check:
    """Whether a removal gives the masked model, tried on copies in float64; the model is not changed.

    Compared on the inputs given and on random ones, with the model's weights and twice more with noise added to all of
    them: a branch that starts at zero, as the last norm of a residual block may, would hide what is wrong behind it.
    Then once in training mode, without dropout, if the model runs there on these inputs.

    Args:
        model: The model before the removal.
        slices: What is kept of which tensor, as for :func:`resu.pruning.structured.removal.shrink_tensors`.
        example_inputs: A tensor, a tuple of arguments or a dictionary of keyword arguments.
        shrink: ``shrink(copy)``, which makes a copy smaller in place; None: ``shrink_tensors(copy, slices)``.
        rtol: Largest difference allowed, over the largest output.
        seed: Of the random inputs and the noise; the global generators are left alone.

    Raises:
        TypeError: If the model cannot be copied, or returns no tensor.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> kept = torch.tensor([0, 2])
        >>> good = {"0.weight": {0: kept}, "0.bias": {0: kept}, "2.weight": {1: kept}}
        >>> bool(verify_removal(model, good, torch.ones(1, 4)))
        True
        >>> verify_removal(model, {**good, "2.weight": {1: torch.tensor([0, 1])}}, torch.ones(1, 4)).ok
        False
    """
    return verify_smaller(
        model,
        lambda masked: mask_tensors(masked, slices),
        shrink or (lambda small: shrink_tensors(small, slices)),
        example_inputs,
        rtol=rtol,
        seed=seed,
    )


def verify_smaller(
    model: nn.Module,
    mask: Callable[[nn.Module], object],
    shrink: Callable[[nn.Module], object],
    example_inputs: Any,
    *,
    rtol: float = 1e-9,
    seed: int = 0,
) -> Check:
    """Whether what ``shrink`` makes of a copy equals what ``mask`` makes of one, as :func:`verify_removal` compares.

    Args:
        model: Not changed.
        mask: ``mask(copy)``, which zeroes in place what is to go.
        shrink: ``shrink(copy)``, which takes it out in place.
        example_inputs, rtol, seed: As for :func:`verify_removal`.

    Raises:
        TypeError: If the model cannot be copied, or returns no tensor.
    """
    generator = torch.Generator().manual_seed(seed)
    whole = double_copy(model)
    worst = 0.0
    with seeded(seed):
        for round_ in range(_ROUNDS):
            if round_:
                add_noise(whole, generator)
            masked, small = copy.deepcopy(whole), copy.deepcopy(whole)
            mask(masked)
            try:
                shrink(small)
            except (ValueError, TypeError, KeyError) as error:
                return Check(float("inf"), str(error))
            for source in (generator, generator if round_ else None):
                check = compare(masked, small, random_like(example_inputs, source), rtol)
                if not check:
                    return check
                worst = max(worst, check.error)
        if reason := differs_in_training(masked, small, random_like(example_inputs, generator), rtol):
            return Check(float("inf"), reason)
    return Check(worst)


def _versions(model: nn.Module, inputs: Any) -> dict[str, int]:
    """How often each parameter, buffer and input was written to, by its name in a message."""
    found = {repr(name): slot.tensor for name, slot in slots(model).items()}
    found |= {f"its input {path}" if path else "its input": leaf for path, leaf in leaves(inputs)}
    return {n: x._version for n, x in found.items() if isinstance(x, Tensor) and not x.is_inference()}
