"""L2 norms of a layer's inputs, accumulated over batches: what Wanda scores need."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

__all__ = ["ActivationCapture"]


class ActivationCapture:
    """Mixin: ``capture_activations``, ``activation_norms`` and their older spellings."""

    _capture: bool
    _square_sums: Tensor | None

    def _init_capture(self) -> None:
        self._capture = False
        self._square_sums = None

    @property
    def capture_activations(self) -> bool:
        """Whether forward passes add to :attr:`activation_norms`. Switching it on starts anew."""
        return self._capture

    @capture_activations.setter
    def capture_activations(self, value: bool) -> None:
        if value and not self._capture:
            self._square_sums = None
        self._capture = bool(value)

    @property
    def activation_norms(self) -> Tensor | None:
        """L2 norm per input over all batches so far, float32; None before the first one.

        ``[in]`` for a linear layer; ``[in, kh, kw]`` for a convolution (the norm of each column of the
        unfolded input).
        """
        return None if self._square_sums is None else self._square_sums.sqrt()

    @property
    def _capture_activations(self) -> bool:
        return self._capture

    @_capture_activations.setter
    def _capture_activations(self, value: bool) -> None:
        self.capture_activations = value

    @property
    def _activation_norms(self) -> Tensor | None:
        return self.activation_norms

    def capture_state(self) -> Tensor | None:
        """The running sums while capturing, None otherwise; :meth:`resume_capture` goes on from them."""
        return self._square_sums if self._capture else None

    def resume_capture(self, sums: Tensor) -> None:
        """Go on capturing where :meth:`capture_state` was taken."""
        self._capture, self._square_sums = True, sums

    def reset_activations(self) -> None:
        """Forget what was accumulated."""
        self._square_sums = None

    def _add_squares(self, sums: Tensor) -> None:
        old = self._square_sums
        self._square_sums = sums if old is None else old.to(sums.device) + sums

    if TYPE_CHECKING:  # the layers say how

        def _norms_like_weight(self, norms: Tensor) -> Tensor: ...
