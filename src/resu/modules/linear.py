"""``RESULinear``: an ``nn.Linear`` whose weight can be pruned and resurrected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resu.modules.assembled import assembled_linear
from resu.modules.base import RESUModule
from resu.modules.settings import RESUMode
from resu.modules.sparse_forward import sparse_linear

__all__ = ["RESULinear", "RESUMode"]


class RESULinear(RESUModule, nn.Linear):
    """Drop-in ``nn.Linear``: the same start values, results and ``state_dict`` keys while dense.

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        bias: Whether there is a bias.
        device: Where to.
        dtype: Of weight and bias.
        sparse_threshold: Sparsity from which inference in SPARSE mode may use torch's CSR product: a number,
            or ``"auto"`` for where it was measured to pay. Results are the same.

    Example:
        >>> layer = RESULinear(8, 4)
        >>> layer.prune_by_magnitude(0.5)
        >>> layer.enter_resu_mode(epsilon=0.1)
        >>> optimizer = torch.optim.Adam([layer.weight])  # trains θ; active weights stay bit-identical
        >>> layer(torch.ones(2, 8)).sum().backward()
        >>> optimizer.step()
        >>> layer.exit_resu_mode(commit=False)
        >>> layer.mode, layer.sparsity
        (<RESUMode.SPARSE: 'sparse'>, 0.5)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        sparse_threshold: float | str = "auto",
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._init_resu(sparse_threshold)

    def forward(self, input: Tensor, use_sparse: bool = True) -> Tensor:
        """``input @ W_eff.T + bias``.

        Args:
            input: ``[…, in]``.
            use_sparse: Whether inference in SPARSE mode may use a packed product. Never changes results
                beyond rounding.

        Returns:
            ``[…, out]``.
        """
        if self._capture:
            self._record(input)
        mode = self._settings.mode
        if mode.quantized:
            return assembled_linear(input, self._theta_parameter(), self.bias, self._rows(), self.weight_dtype)
        weight = self.weight
        if use_sparse and mode is RESUMode.SPARSE:
            y = sparse_linear(self, input, weight, self.bias)
            if y is not None:
                return y
        return F.linear(input, weight, self.bias)

    @torch.no_grad()
    def _record(self, x: Tensor) -> None:
        flat = x.detach().reshape(-1, self.in_features)
        self._add_squares(torch.linalg.vector_norm(flat, dim=0, dtype=torch.float32).square_())

    def _norms_like_weight(self, norms: Tensor) -> Tensor:
        if norms.shape != (self.in_features,):
            raise ValueError(
                f"activation_norms has shape {tuple(norms.shape)}, expected one norm per input ({self.in_features},)"
            )
        return norms

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> RESULinear:
        """A layer that shares (not copies) the parameters of ``linear``."""
        new = cls(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta",
            dtype=linear.weight.dtype, **options,
        )  # fmt: skip
        new._parameters["weight"], new._parameters["bias"] = (
            linear._parameters["weight"],
            linear._parameters["bias"],
        )
        return new
