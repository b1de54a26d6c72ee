"""The optimizer-state contract: state of a weight that is born, dies or freezes is zero."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from resu.core.sharding import local

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
        optimizer: Holds the state; a parameter it does not know has none. State in 8-bit codes with a code book (of
            bitsandbytes and torchao) is set to the code that stands for 0.
        parameter: The weight. Of one that is sharded over ranks (``DTensor``) the part that lies here is meant.
        where: Bool of the parameter's shape, or flat int64 indices; of the local part's shape where it is sharded.

    Raises:
        TypeError: If a state tensor holds codes in which no single weight can be set to 0.
    """
    with torch.no_grad():
        for name, value in state_tensors(optimizer, parameter).items():
            target, zero = _editable(optimizer, parameter, name, local(value))
            here = where.to(target.device)
            if here.dtype == torch.bool:
                target.masked_fill_(here, zero)
            elif target.is_contiguous():
                target.view(-1)[here] = zero
            else:
                target[torch.unravel_index(here, target.shape)] = zero


def _editable(optimizer: Optimizer, parameter: Tensor, name: str, value: Tensor) -> tuple[Tensor, float]:
    """The tensor to write to, one element per weight, and what stands for 0 in it."""
    codes = getattr(value, "codes", None)
    if isinstance(codes, Tensor) and codes.shape == value.shape:  # torchao's 8-bit tensors
        if codes.is_floating_point():  # float8, whose zero is the zero byte
            return codes.view(torch.uint8), 0
        return codes, _code_of_zero(value.qmap)  # type: ignore[attr-defined]
    if value.is_floating_point() or value.is_complex():
        if codes is None:
            return value, 0.0
    elif f"{name}_scale" in optimizer.state[parameter]:  # AdamW8bit of this library: 0 stands for 0
        return value, 0
    else:
        book = optimizer.state[parameter].get(f"qmap{name.removeprefix('state')}")  # bitsandbytes: state1 and qmap1
        if isinstance(book, Tensor):
            return value, _code_of_zero(book)
    raise TypeError(
        f"{type(optimizer).__name__} keeps {name!r} as {value.dtype} codes, in which single weights cannot be set to "
        "zero; use an optimizer with floating-point or 8-bit state for sparse layers"
    )


def _code_of_zero(book: Tensor) -> int:
    return int(book.abs().argmin())
