"""The dense gradient of a step, caught before the mask is laid on it."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from resu.core.enforcement import Constraint
from resu.core.sharding import local

__all__ = ["DenseGradient", "ratio_of_norms", "squared_norms"]


class DenseGradient:
    """Sums ``∂L/∂(M⊙W)`` of one weight in fp32 over the micro-batches of a step.

    At pruned positions the accumulated gradient holds the last micro-batch alone (it is zeroed there each time), so
    these are added up; at active ones it is the sum already. A new step is told from a further micro-batch by the
    tensor that gradients are accumulated in: after ``zero_grad`` it is another one, or has been written to since. So a
    step that was never taken (an AMP step that met an infinity) leaves nothing behind.
    """

    def __init__(self, constraint: Constraint) -> None:
        self.total: Tensor | None = None
        self._constraint = weakref.ref(constraint)
        self._last: weakref.ref[Tensor] | None = None
        self._version = -1

    def before(self, gradient: Tensor) -> None:
        """Add what the backward pass has left."""
        constraint = self._constraint()
        assert constraint is not None
        if self.total is None or self._is_new(gradient) or not constraint.mask_gradient:
            self.total = gradient.to(torch.float32, copy=True)
            return
        passed = constraint.mask if constraint.gradient_mask is None else constraint.gradient_mask
        passed.zero_(self.total, active=True)
        self.total.add_(gradient)

    def _is_new(self, gradient: Tensor) -> bool:
        if self._last is None or self._last() is not gradient:
            return True
        # Accumulating writes once; anything more is zero_grad, unscaling, clipping: the step before is over. Views of
        # one buffer (FSDP2, buckets of DDP) share a count of writes, so it tells nothing of one of them.
        return gradient._base is None and gradient._version > self._version + 1

    def after(self, gradient: Tensor) -> None:
        """Remember the masked gradient, to know it again."""
        self._last, self._version = weakref.ref(gradient), gradient._version

    def take(self) -> Tensor | None:
        """The sum, handed over: the next step starts anew."""
        total, self.total, self._last = self.total, None, None
        return total


def squared_norms(caught: Tensor, given: Tensor | None) -> Tensor:
    """Of what the optimizer is given, and of what was caught where the optimizer is given something: two float64."""
    if given is None:
        return torch.zeros(2, dtype=torch.float64, device=caught.device)
    given = local(given)
    seen = caught.masked_fill(given == 0, 0)
    return torch.stack([torch.linalg.vector_norm(x, dtype=torch.float64) for x in (given, seen)]).square()


def ratio_of_norms(squares: Tensor) -> Tensor:
    """By what a caught gradient was multiplied since (a ``GradScaler`` divides, clipping shortens); 1 if unknown."""
    ratio = (squares[0] / squares[1]).sqrt()
    return torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0).float()
