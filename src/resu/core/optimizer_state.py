"""The optimizer-state contract: state of a weight that is born, dies or freezes is zero."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["clear_state", "state_tensors"]


def state_tensors(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The state tensors that have the parameter's shape (momenta, second moments, masters).

    Factored and scalar state (Adafactor's rows and columns, step counters) describes no single weight and
    is left out.
    """
    state = optimizer.state.get(parameter, {})
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim > 0
    }


def clear_state(optimizer: Optimizer, parameter: Tensor, where: Tensor) -> None:
    """Zero every element-wise state tensor of ``parameter`` at ``where``.

    The first step of a weight whose Adam moments were cleared late in training is not bias-corrected any
    more: it is up to ``(1 - β1) / sqrt(1 - β2)``, about 3.2, times lr.

    Args:
        optimizer: Holds the state; a parameter it does not know has none.
        parameter: The weight.
        where: Bool of the parameter's shape, or flat int64 indices.

    Raises:
        TypeError: If a state tensor holds integer codes (8-bit optimizers), where code 0 need not mean 0.
    """
    with torch.no_grad():
        for name, value in state_tensors(optimizer, parameter).items():
            if not (value.is_floating_point() or value.is_complex()):
                raise TypeError(
                    f"{type(optimizer).__name__} keeps {name!r} as {value.dtype} codes, in which single weights "
                    "cannot be set to zero; use an optimizer with floating-point state for sparse layers"
                )
            here = where.to(value.device)
            if here.dtype == torch.bool:
                value.masked_fill_(here, 0)
            elif value.is_contiguous():
                value.view(-1)[here] = 0
            else:
                value[torch.unravel_index(here, value.shape)] = 0
