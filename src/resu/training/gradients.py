"""What a rule looks at before an optimizer step, and what it adds: gradients as the optimizer gets them, penalties."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from resu.core.sharding import is_sharded, local
from resu.training.agreement import Agreement
from resu.training.algorithms.base import Algorithm
from resu.training.held_layer import HeldLayer
from resu.training.observer import ratio_of_norms, squared_norms

__all__ = ["add_penalty", "gathered_gradient", "is_no_step"]


def is_no_step(optimizer: Optimizer, held: Iterable[HeldLayer]) -> bool:
    """Whether an optimizer is stepped only to make it show its state, as ``get_state_dict`` of torch does.

    It has no state, every learning rate is 0 and every gradient too: nothing moves, and nothing was learned from. The
    first step of a warm-up has gradients.
    """
    if optimizer.state or any(float(group["lr"]) != 0 for group in optimizer.param_groups):
        return False
    gradients = [one.layer.weight.grad for one in held]
    return not any(gradient is not None and bool(local(gradient).any()) for gradient in gradients)


def gathered_gradient(held: HeldLayer, agreement: Agreement, active: bool, scale: Tensor | None) -> Tensor | None:
    """What the coming update looks at, fp32, of the local part; afterwards gradients may be gone.

    Args:
        held: The layer; where it is observed, the dense gradient is meant.
        agreement: Averages it over processes.
        active: Whether the gradient at active positions is wanted where none is observed.
        scale: By what a fused optimizer will divide; None: gradients are unscaled by now.
    """
    given = held.layer.weight.grad
    if held.constraint.observer is not None:
        gradient = _dense(held, agreement)
    elif active and given is not None:
        gradient = local(given).to(torch.float32, copy=True)
    else:
        return None
    return gradient if gradient is None or scale is None else gradient.div_(scale)


def _dense(held: HeldLayer, agreement: Agreement) -> Tensor | None:
    """The dense gradient on the scale of what the optimizer is given: unscaled by now, and clipped."""
    gradient = held.take_dense_gradient()
    caught = gradient is not None
    if gradient is None:
        if agreement.world == 1:
            return None
        gradient = torch.zeros_like(held.weight, dtype=torch.float32)  # it still counts in the mean
    if not is_sharded(held.layer.weight):  # sharded gradients are reduced already
        agreement.mean_(gradient)
    grad = held.layer.weight.grad
    given = None if grad is None else local(grad)
    if agreement.world == 1 and given is not None and given.is_cpu and _is_part(given, gradient):
        return gradient  # as it was caught
    squares = squared_norms(gradient, given)
    if agreement.world > 1:
        squares = agreement.mean_(torch.cat([squares, squares.new_tensor([float(caught)])]))
        if squares[2] == 0:  # in no rank's loss: there is none, as in one process
            return None
    return gradient.mul_(ratio_of_norms(squares))


def _is_part(given: Tensor, caught: Tensor) -> bool:
    """Whether what was given is what was caught, where it is not 0; much cheaper than norms."""
    return bool(((given == caught) | (given == 0)).all())


def add_penalty(held: HeldLayer, algorithm: Algorithm, scale: Tensor | None) -> None:
    """Add a rule's penalty to the gradient that the optimizer is given, where θ may learn."""
    gradient = held.layer.weight.grad
    if gradient is None or held.theta is None:
        return
    penalty = algorithm.penalty(held.weight, held.theta)
    if penalty is not None:
        if held.reach is not None:
            held.reach.zero_(penalty, active=False)
        local(gradient).add_(penalty if scale is None else penalty * scale)
