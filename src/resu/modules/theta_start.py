"""What θ starts at when a layer enters a resurrection mode."""

from __future__ import annotations

import torch
from torch import Tensor

from resu.core.mask import SparseMask
from resu.core.resurrection import init_theta, sigma_active

__all__ = ["THETA_STARTS", "start_theta"]

THETA_STARTS = ("normal", "zeros")


def start_theta(init: str | Tensor, weight: Tensor, mask: SparseMask, epsilon: float, dtype: torch.dtype) -> Tensor:
    """θ before its first step.

    Args:
        init: ``"normal"``: N(0, (ε·σ_active)²). ``"zeros"``. Or the values themselves, ``[p]``, row-major, of any
            floating dtype: ``gather_theta(dense, mask)`` makes a layer start as its dense weight ``dense``, which is
            what fine-tuning a pretrained layer wants. They are copied; equal dtypes keep every bit.
        weight: ``[out, in…]``; its active values give σ.
        mask: True = active.
        epsilon: See ``"normal"``.
        dtype: Of θ.

    Returns:
        ``[p]`` in ``dtype``, on the weight's device.

    Raises:
        TypeError: If ``init`` is neither a name nor a tensor.
        ValueError: On an unknown name, or values of another shape or of a dtype that is not floating.

    Example:
        >>> mask = SparseMask(torch.tensor([[True, False], [False, True]]))
        >>> start_theta(torch.tensor([2.0, 3.0]), torch.ones(2, 2), mask, 0.1, torch.float32)
        tensor([2., 3.])
    """
    if isinstance(init, Tensor):
        if init.shape != (mask.n_pruned,) or not init.is_floating_point():
            raise ValueError(
                f"init as a tensor must be floating values of shape {(mask.n_pruned,)}, one per pruned position in "
                f"row-major order; got {init.dtype} of shape {tuple(init.shape)}. gather_theta(weight, mask) takes "
                "them from a dense weight"
            )
        return init.detach().to(weight.device, dtype, copy=True)
    if not isinstance(init, str):
        raise TypeError(f"init must be a name ({', '.join(THETA_STARTS)}) or a tensor, got {type(init).__name__}")
    if init == "normal":
        return init_theta(mask, sigma_active(weight, mask), epsilon, dtype, weight.device)
    if init == "zeros":
        return torch.zeros(mask.n_pruned, dtype=dtype, device=weight.device)
    raise ValueError(f"unknown init {init!r}; known: {', '.join(THETA_STARTS)}, or a tensor of values")
