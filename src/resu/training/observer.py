"""The dense gradient of a step, caught before the mask is laid on it."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from resu.core.enforcement import Constraint

__all__ = ["DenseGradient"]


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
        same = self._last is not None and self._last() is gradient
        # Accumulating in place writes once; anything more is zero_grad, unscaling, clipping: the step before is over.
        if self.total is None or not same or gradient._version > self._version + 1 or not constraint.mask_gradient:
            self.total = gradient.to(torch.float32, copy=True)
            return
        constraint.mask.zero_(self.total, active=True)
        self.total.add_(gradient)

    def after(self, gradient: Tensor) -> None:
        """Remember the masked gradient, to know it again."""
        self._last, self._version = weakref.ref(gradient), gradient._version

    def take(self) -> Tensor | None:
        """The sum, handed over: the next step starts anew."""
        total, self.total, self._last = self.total, None, None
        return total
