"""The kinds of layers that take sparse LoRA adapters: linear, convolution, and Hugging Face's ``Conv1D``."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resu.core.layers import is_conv1d_of_transformers
from resu.core.mask import SparseMask
from resu.kernels.masked_lora import masked_lora_linear
from resu.kernels.masked_lora_conv import masked_lora_conv2d
from resu.pruning.sparse_lora.config import MODES
from resu.pruning.sparse_lora.layer import SparseLoRALayer

__all__ = ["SparseLoRAConv1D", "SparseLoRAConv2d", "SparseLoRALinear", "kind_of", "to_plain", "to_sparse_lora"]


class _Forward(SparseLoRALayer):
    """The forward pass of every kind, from three products that each has its own of."""

    def forward(self, input: Tensor) -> Tensor:
        """The layer's product with the weight that acts now.

        Args:
            input: As the plain layer takes it.

        Returns:
            As the plain layer gives it.
        """
        names = self._acting()
        weight = self._parameters["weight"]
        if weight is not None and (self.merged or not names):
            return self._product(input, weight)
        rule = MODES[self.mode]
        if rule != "dense":
            return self._masked(input, *self._factors(names, dropout=True), rule)
        y = self._masked(input, *self._factors([]), rule) if weight is None else self._product(input, weight)
        for name in names:
            config, a, b = self.configs[name], self.lora_A[name], self.lora_B[name]
            x = input if torch.is_autocast_enabled(input.device.type) else input.to(a.dtype)
            y = y + self._low_rank(F.dropout(x, config.dropout, self.training), a, b * config.scale).to(y.dtype)
        return y

    @abstractmethod
    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        """With a dense weight, as the plain layer."""

    @abstractmethod
    def _masked(self, x: Tensor, left: Tensor, right: Tensor, rule: str) -> Tensor:
        """With the base and factors together."""

    @abstractmethod
    def _low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """With ``b @ a`` alone, through the low rank."""


class SparseLoRALinear(_Forward, nn.Linear):
    """``nn.Linear`` with adapters; see :class:`resu.pruning.sparse_lora.layer.SparseLoRALayer`."""

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)

    def _masked(self, x: Tensor, left: Tensor, right: Tensor, rule: str) -> Tensor:
        return masked_lora_linear(x, self._base(), left, right, self.bias, rule=rule)

    def _low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(F.linear(x, a), b)


class SparseLoRAConv1D(_Forward):
    """Hugging Face ``Conv1D`` (a linear layer that stores ``[in, out]``) with adapters."""

    transposed = True

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.plain: type[nn.Module] | None = None  # the class it was made from, which is not imported here

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight.t(), self.bias)

    def _masked(self, x: Tensor, left: Tensor, right: Tensor, rule: str) -> Tensor:
        return masked_lora_linear(x, self._base(), left, right, self.bias, rule=rule, transposed=self._inputs_first)

    def _low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(F.linear(x, a), b)


class SparseLoRAConv2d(_Forward, nn.Conv2d):
    """``nn.Conv2d`` with adapters; B mixes the r channels that A makes of each group's inputs."""

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = self._conv_forward(x, weight, self.bias)
        return y

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The input padded where the operator cannot, and what is left for the operator to pad."""
        if self.padding_mode != "zeros":
            return F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0, 0)
        if self.padding == "valid":
            return x, (0, 0)
        if self.padding == "same":
            return F.pad(x, self._reversed_padding_repeated_twice), (0, 0)
        return x, tuple(int(p) for p in self.padding)

    def _masked(self, x: Tensor, left: Tensor, right: Tensor, rule: str) -> Tensor:
        x, padding = self._padded(x)
        return masked_lora_conv2d(
            x, self._base(), left, right, self.bias, rule=rule, kernel=self.kernel_size, stride=self.stride,
            padding=padding, dilation=self.dilation, groups=self.groups,
        )  # fmt: skip

    def _low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        x, padding = self._padded(x)
        # Every group has the same A on its own inputs.
        down = a.view(-1, self.in_channels // self.groups, *self.kernel_size).repeat(self.groups, 1, 1, 1)
        hidden = F.conv2d(x, down, None, self.stride, padding, self.dilation, self.groups)
        return F.conv2d(hidden, b.view(*b.shape, 1, 1), groups=self.groups)


def kind_of(module: nn.Module) -> str | None:
    """``"Linear"``, ``"Conv2d"`` or ``"Conv1D"`` if a layer takes adapters (or has them), else None.

    Subclasses of torch's layers do not: other code relies on their inside, or never calls them
    (``nn.MultiheadAttention`` multiplies with its output projection itself).

    Example:
        >>> kind_of(nn.Linear(2, 2)), kind_of(nn.Bilinear(2, 2, 2))
        ('Linear', None)
    """
    if not isinstance(module, SparseLoRALayer) and not isinstance(module._parameters.get("weight"), nn.Parameter):
        return None  # computed (weight_norm), or none
    if type(module) in (nn.Linear, SparseLoRALinear):
        return "Linear"
    if type(module) in (nn.Conv2d, SparseLoRAConv2d):
        return "Conv2d"
    plain = type(module).__name__ == "Conv1D" and is_conv1d_of_transformers(module)
    return "Conv1D" if plain or type(module) is SparseLoRAConv1D else None


def to_sparse_lora(module: nn.Module, mask: SparseMask, *, bits: int | None = None, hold: bool = True) -> _Forward:
    """A layer for adapters that shares (not copies) the parameters of a plain one; none is on it yet.

    Args:
        module: ``nn.Linear``, ``nn.Conv2d`` or Hugging Face ``Conv1D``.
        mask: Of its weight; pruned positions become 0.
        bits: 4 or 8 to quantize the base; None to leave it.
        hold: Whether the mask is held (``maintain_sparsity``).
    """
    new: _Forward
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    if isinstance(module, nn.Linear):
        new = SparseLoRALinear(module.in_features, module.out_features, bias is not None, "meta", weight.dtype)
    elif isinstance(module, nn.Conv2d):
        new = SparseLoRAConv2d(*_sizes(module, weight.dtype))
    else:
        new = SparseLoRAConv1D(weight.shape[1], weight.shape[0])
        new.plain = type(module)
    new._parameters["weight"], new._parameters["bias"] = None, bias
    for name, value in module.__dict__.items():
        new.__dict__.setdefault(name, value)  # what other code has noted on the layer
    _carry(module, new)
    new._init_lora(weight, mask, bits, hold)
    return new


def to_plain(layer: SparseLoRALayer) -> nn.Module:
    """The plain layer again, with the weight that ``layer`` holds now (merged or base), shared."""
    bias, weight = layer._parameters["bias"], layer._parameters["weight"]
    if weight is None:
        weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
    new: nn.Module
    if isinstance(layer, SparseLoRALinear):
        new = nn.Linear(layer.in_features, layer.out_features, bias is not None, "meta", weight.dtype)
    elif isinstance(layer, SparseLoRAConv2d):
        new = nn.Conv2d(*_sizes(layer, weight.dtype))
    else:
        assert isinstance(layer, SparseLoRAConv1D)
        assert layer.plain is not None
        with torch.device("meta"):
            new = layer.plain(layer.nf, layer.nx)
    new._parameters["weight"], new._parameters["bias"] = weight, bias
    layer.let_go()
    _carry(layer, new)
    return new


def _sizes(conv: nn.Conv2d, dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments that make a convolution like this one, without memory."""
    return (
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        conv.bias is not None, conv.padding_mode, "meta", dtype,
    )  # fmt: skip


def _carry(old: nn.Module, new: nn.Module) -> None:
    """Training flag and hooks, which go on knowing each other."""
    new.training = old.training
    for name, value in old.__dict__.items():
        if name.endswith("_hooks") or "_hooks_" in name:
            new.__dict__[name] = value
