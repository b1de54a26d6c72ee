"""``RESUConv2d``: an ``nn.Conv2d`` whose weight can be pruned and resurrected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resu.modules.assembled import assembled_conv2d
from resu.modules.base import RESUModule
from resu.modules.settings import RESUMode

__all__ = ["RESUConv2d", "RESUMode"]


class RESUConv2d(RESUModule, nn.Conv2d):
    """Drop-in ``nn.Conv2d`` with every option of it (stride, padding, padding mode, dilation, groups).

    A row of the weight is one output channel: ``[out, in / groups · kh · kw]``.

    Example:
        >>> layer = RESUConv2d(3, 8, kernel_size=3, padding="same")
        >>> layer.prune_by_magnitude(0.5)
        >>> layer.enter_qresu_mode(bits=4)
        >>> layer(torch.ones(1, 3, 5, 5)).shape, layer.theta.shape
        (torch.Size([1, 8, 5, 5]), torch.Size([108]))
    """

    def __init__(self, *args: Any, sparse_threshold: float | str = "auto", **kwargs: Any) -> None:
        nn.Conv2d.__init__(self, *args, **kwargs)
        self._init_resu(sparse_threshold)

    def forward(self, input: Tensor, use_sparse: bool = True) -> Tensor:
        """Convolution with ``W_eff``; ``[batch, in, h, w]`` or ``[in, h, w]``.

        ``use_sparse`` is accepted for symmetry with ``RESULinear``: there is no packed convolution yet.
        """
        if self._capture:
            self._record(input)
        if not self._settings.mode.quantized:
            y: Tensor = self._conv_forward(input, self.weight, self.bias)
            return y
        padded, padding = self._padded(input)
        return assembled_conv2d(
            padded, self._theta_parameter(), self.bias, self._rows(), self.weight_dtype,
            self.kernel_size, self.stride, padding, self.dilation, self.groups,
        )  # fmt: skip

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The input padded where the operator cannot, and what is left for the operator to pad."""
        if self.padding_mode != "zeros":
            return F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0, 0)
        if self.padding == "valid":
            return x, (0, 0)
        if self.padding == "same":
            return F.pad(x, self._reversed_padding_repeated_twice), (0, 0)
        return x, tuple(int(p) for p in self.padding)

    @torch.no_grad()
    def _record(self, x: Tensor) -> None:
        """Exact squared norm of each column of the unfolded input, without unfolding it."""
        x = x.detach()
        x, padding = self._padded(x if x.ndim == 4 else x.unsqueeze(0))
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0])).float().square()
        (kh, kw), (sh, sw), (dh, dw) = self.kernel_size, self.stride, self.dilation
        oh = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
        ow = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
        sums = x.new_empty(x.shape[1], kh, kw)
        for i in range(kh):
            for j in range(kw):
                seen = x[:, :, i * dh : i * dh + sh * (oh - 1) + 1 : sh, j * dw : j * dw + sw * (ow - 1) + 1 : sw]
                sums[:, i, j] = seen.sum(dim=(0, 2, 3))
        self._add_squares(sums)

    def _norms_like_weight(self, norms: Tensor) -> Tensor:
        kernel = self.kernel_size
        if norms.shape == (self.in_channels,):
            norms = norms.view(-1, 1, 1).expand(-1, *kernel)
        if norms.shape != (self.in_channels, *kernel):
            raise ValueError(
                f"activation_norms has shape {tuple(norms.shape)}, expected ({self.in_channels},) or "
                f"{(self.in_channels, *kernel)}"
            )
        # Output channel o of group g sees the input channels of that group only.
        per_group = norms.reshape(self.groups, 1, self.in_channels // self.groups, *kernel)
        rows = per_group.expand(-1, self.out_channels // self.groups, -1, -1, -1)
        return rows.reshape(self._weight_shape)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **options: Any) -> RESUConv2d:
        """A layer that shares (not copies) the parameters of ``conv``."""
        new = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.groups, conv.bias is not None, conv.padding_mode, device="meta", dtype=conv.weight.dtype,
            **options,
        )  # fmt: skip
        new._parameters["weight"], new._parameters["bias"] = (
            conv._parameters["weight"],
            conv._parameters["bias"],
        )
        return new
