"""A target layer under sparse LoRA: a sparse base layer as it is, its mask, and for each adapter A and B."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F

from resu.core.mask import SparseMask
from resu.core.resurrection import gather_theta
from resu.integrations.peft.buffers import Exact
from resu.integrations.peft.geometry import as_weight, padded_input, rows_and_columns
from resu.integrations.peft.loading import check_filled, check_shapes, make_room, read_mask
from resu.kernels.masked_lora import masked_lora_linear
from resu.kernels.masked_lora_conv import masked_lora_conv2d
from resu.kernels.masked_weight import MaskedWeight
from resu.pruning.sparse_lora.config import MODES

__all__ = ["SparseLoRALayer", "check_zeros"]


class SparseLoRALayer(nn.Module, BaseTunerLayer):
    """What PEFT puts in the place of a target: ``W + K⊙(s·BA)``, W the frozen sparse weight of ``base_layer``.

    K is the mask (``sparse_to_sparse``), W itself (``scale``) or 1 (``sparse_to_dense``). All adapters of a layer have
    its mask and one mode; of several active ones the products add up.

    Attributes:
        sparse_lora_A: ``{adapter: [r, in]}``.
        sparse_lora_B: ``{adapter: [out, r]}``.
        sparse_lora_bitmask: ``{adapter: mask bits}``, uint8 ``[out, ceil(in / 8)]``, the same for all.
        configs: ``{adapter: its configuration}``.
    """

    adapter_layer_names = ("sparse_lora_A", "sparse_lora_B")
    other_param_names = ("sparse_lora_bitmask", "configs")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.sparse_lora_A, self.sparse_lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.sparse_lora_bitmask = Exact()
        self.sparse_lora_before = Exact(persistent=False)  # "base": the weight that is overwritten while merged
        self.configs: dict[str, Any] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False

    # -- adapters -------------------------------------------------------------------------------------
    def add(self, adapter: str, mask: SparseMask | None, config: Any, name: str) -> None:
        """Add an adapter that changes nothing yet (A random, B zero); without a mask it waits for its file.

        Raises:
            ValueError: If the weight is not 0 where the mask prunes, or the layer has another mask or mode.
        """
        modes = {other.sparsity_mode for other in self.configs.values()} - {config.sparsity_mode}
        if modes:
            raise ValueError(
                f"{name} has adapters in mode {modes.pop()!r}; one of {config.sparsity_mode!r} cannot join"
            )
        rows = self._rows()
        if mask is not None:
            self._check_mask(adapter, mask, name)
        a = rows.new_empty(config.r, rows.shape[1])
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # as nn.Linear(in, r), and so LoRA
        self.sparse_lora_A[adapter] = nn.Parameter(a)
        self.sparse_lora_B[adapter] = nn.Parameter(rows.new_zeros(rows.shape[0], config.r))
        empty = torch.empty(0, 0, dtype=torch.uint8, device=rows.device)
        self.sparse_lora_bitmask[adapter] = empty if mask is None else mask.packed
        self.configs[adapter] = config

    def parts(self) -> tuple[str, ...]:
        """Names of the tensors of an adapter in its file."""
        return ("sparse_lora_A", "sparse_lora_B", "sparse_lora_bitmask")

    def expect(self, adapter: str, given: Mapping[str, Tensor], name: str) -> None:
        """Make room for the tensors of an adapter file.

        Raises:
            ValueError: If they do not belong to this weight, its mask, or together.
        """
        rows, r = self._rows(), self.configs[adapter].r
        mask = read_mask(given["sparse_lora_bitmask"], rows.shape, name).to(rows.device)
        check_shapes(name, given, {"sparse_lora_A": (r, rows.shape[1]), "sparse_lora_B": (rows.shape[0], r)})
        self._check_mask(adapter, mask, name)
        make_room(self.sparse_lora_bitmask, adapter, given["sparse_lora_bitmask"])

    def _check_mask(self, adapter: str, mask: SparseMask, name: str) -> None:
        check_zeros(self.sparse_lora_before["base"] if self.merged else self._rows(), mask, name)
        for other in self.sparse_lora_bitmask:
            bits = self.sparse_lora_bitmask[other]
            if other != adapter and bits.numel() and not torch.equal(bits, mask.packed):
                raise ValueError(f"{name}: adapter {adapter!r} has another mask than {other!r}; adapters share one")

    @property
    def _base(self) -> Any:
        return self.get_base_layer()

    def _rows(self) -> Tensor:
        return rows_and_columns(self._base, self._base.weight.detach())

    def _own(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.configs]

    def _masked(self, rows: Tensor) -> MaskedWeight:
        adapter = next(iter(self.configs))
        check_filled(self.sparse_lora_bitmask[adapter], adapter)
        return MaskedWeight.dense(rows, self.sparse_lora_bitmask[adapter])

    def _factors(self, names: Iterable[str], *, dropout: bool) -> tuple[Tensor, Tensor]:
        """``left`` and ``right`` of all these adapters together, as the operators take them."""
        left, right = [], []
        for name in names:
            config, a = self.configs[name], self.sparse_lora_A[name]
            if dropout and self.training and config.dropout:
                a = a * F.dropout(a.new_ones(config.r, 1), config.dropout)
            right.append(a)
            left.append(self.sparse_lora_B[name] * config.scale)
        return torch.cat(left, dim=1), torch.cat(right)

    # -- use ------------------------------------------------------------------------------------------
    def forward(self, x: Tensor) -> Tensor:
        """What the base layer gives for ``x`` with the adapted weight."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.disable_adapters or self.merged else self._own(self.active_adapters)
        base = self._base
        if not names:
            y: Tensor = base(x)
            return y
        rule, masked = MODES[self.configs[names[0]].sparsity_mode], self._masked(self._rows())
        if isinstance(base, nn.Conv2d):
            x, padding = padded_input(base, x)
            return masked_lora_conv2d(
                x, masked, *self._factors(names, dropout=True), base.bias, rule=rule, kernel=base.kernel_size,
                stride=base.stride, padding=padding, dilation=base.dilation, groups=base.groups,
            )  # fmt: skip
        if rule != "dense":
            return masked_lora_linear(x, masked, *self._factors(names, dropout=True), base.bias, rule=rule)
        y = base(x)
        for name in names:
            config, a, b = self.configs[name], self.sparse_lora_A[name], self.sparse_lora_B[name]
            inputs = x if torch.is_autocast_enabled(x.device.type) else x.to(a.dtype)
            low = F.linear(F.dropout(inputs, config.dropout, self.training), a)
            y = y + F.linear(low, b * config.scale).to(y.dtype)
        return y

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """``K⊙(s·BA)`` of one adapter, of the shape and dtype of the base weight."""
        rows = self.sparse_lora_before["base"] if self.merged else self._rows()
        left, right = self._factors([adapter], dropout=False)
        masked = self._masked(rows)
        delta = left.to(masked.wide) @ right.to(masked.wide)
        rule = MODES[self.configs[adapter].sparsity_mode]
        if rule == "scale":
            delta *= rows
        elif rule == "mask":
            masked.mask_(delta, 0, masked.rows)
        return as_weight(self._base, delta.to(rows.dtype), self._base.weight.shape)

    # -- merging --------------------------------------------------------------------------------------
    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters into the base weight, in place: what the forward pass multiplied with, to the last bit.

        In ``sparse_to_dense`` the mask is laid on the result if the configuration says
        ``preserve_sparsity_on_merge``; that is then not the weight that was trained, and a warning says so.

        Args:
            safe_merge: Whether to look for NaN and infinities first.
            adapter_names: Which; by default the active ones.

        Raises:
            ValueError: With ``safe_merge``, if there are such values; nothing is changed.
        """
        names = self._own(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        for name in names:
            both = self.sparse_lora_A[name], self.sparse_lora_B[name]
            if safe_merge and not all(bool(torch.isfinite(factor).all()) for factor in both):
                raise ValueError(f"adapter {name!r} holds NaN or infinite values and was not merged: it is broken")
        if not self.merged:
            self.sparse_lora_before["base"] = self._rows().clone(memory_format=torch.contiguous_format)
        everything = [*self.merged_adapters, *names]
        rule = MODES[self.configs[names[0]].sparsity_mode]
        if rule == "dense" and all(self.configs[name].preserve_sparsity_on_merge for name in everything):
            rule = "mask"
            _warn_of_loss()
        before = self.sparse_lora_before["base"]
        masked = self._masked(before)
        self._write(masked.into_(torch.empty_like(before), *self._factors(everything, dropout=False), rule))
        self.merged_adapters = everything

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back, bit for bit."""
        if self.merged:
            self._write(self.sparse_lora_before["base"])
            del self.sparse_lora_before["base"]  # type: ignore[no-untyped-call]
            self.merged_adapters = []

    def _write(self, rows: Tensor) -> None:
        weight = self._base.weight.detach()
        weight.copy_(as_weight(self._base, rows, weight.shape))


def check_zeros(rows: Tensor, mask: SparseMask, name: str) -> None:
    """Raise ``ValueError`` unless the weight (``[out, in]``) is 0 where the mask prunes."""
    stray = int(torch.count_nonzero(gather_theta(rows, mask)))
    if stray:
        raise ValueError(
            f"{name}: {stray} of {mask.n_pruned} pruned positions of the base weight are not 0; sparse LoRA adapts a "
            "sparse model. Prune it first: resu.pruning.mask_ops.apply_masks_to_model(model, masks)"
        )


def _warn_of_loss() -> None:
    warnings.warn(
        "sparse_to_dense: laying the masks on the merged weights takes away what was trained at pruned positions, so "
        "this is not the model that was trained; train with sparsity_mode='sparse_to_sparse', or set "
        "preserve_sparsity_on_merge=False and get dense weights",
        stacklevel=4,
    )
