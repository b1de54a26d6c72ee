"""A target layer under RESU: the base layer as it is, and for each adapter a mask and θ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from resu.core.mask import SparseMask
from resu.core.resurrection import gather_theta, scatter_theta_
from resu.integrations.peft.buffers import Exact
from resu.integrations.peft.geometry import as_weight, product, rows_and_columns
from resu.integrations.peft.loading import check_filled, check_shapes, make_room, read_mask
from resu.modules.overlaid import overlaid_linear, overlaid_weight

__all__ = ["RESULayer"]


class RESULayer(nn.Module, BaseTunerLayer):
    """What PEFT puts in the place of a target: ``W_eff = M⊙W + Φ(θ)``, W the frozen weight of ``base_layer``.

    Of several active adapters the changes to the base weight add up. Adapters are merged into the base weight in place;
    unmerging puts back what was there, bit for bit.

    Attributes:
        resu_theta: ``{adapter: θ}``, each ``[p]``, row-major over ``[out, in]``.
        resu_bitmask: ``{adapter: mask bits}``, uint8 ``[out, ceil(in / 8)]``, 1 = kept.
    """

    adapter_layer_names = ("resu_theta",)
    other_param_names = ("resu_bitmask",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.resu_theta = nn.ParameterDict()
        self.resu_bitmask = Exact()
        self.resu_before = Exact(persistent=False)  # of each merged adapter what it overwrote
        self.merged_adapters: list[str] = []
        self._disable_adapters = False

    # -- adapters -------------------------------------------------------------------------------------
    def add(self, adapter: str, mask: SparseMask | None, theta: Tensor | None) -> None:
        """Add an adapter; without a mask it is empty until its file is loaded."""
        weight = self._base.weight
        if mask is None or theta is None:
            theta = weight.new_empty(0)
            bits = torch.empty(0, 0, dtype=torch.uint8, device=weight.device)
        else:
            bits = mask.packed
        self.resu_theta[adapter] = nn.Parameter(theta)
        self.resu_bitmask[adapter] = bits

    def parts(self) -> tuple[str, ...]:
        """Names of the tensors of an adapter in its file."""
        return ("resu_theta", "resu_bitmask")

    def expect(self, adapter: str, given: Mapping[str, Tensor], name: str) -> None:
        """Make room for the tensors of an adapter file, which may hold another mask than the layer has.

        Raises:
            ValueError: If they do not belong to a weight of this shape, or together.
        """
        mask = read_mask(given["resu_bitmask"], self._rows().shape, name)
        check_shapes(name, given, {"resu_theta": (mask.n_pruned,)})
        make_room(self.resu_theta, adapter, given["resu_theta"])
        make_room(self.resu_bitmask, adapter, given["resu_bitmask"])

    @property
    def _base(self) -> Any:
        return self.get_base_layer()

    def _rows(self) -> Tensor:
        return rows_and_columns(self._base, self._base.weight.detach())

    def mask_of(self, adapter: str) -> SparseMask:
        """The adapter's mask over ``[out, in]``.

        Raises:
            RuntimeError: If the adapter is empty.
        """
        check_filled(self.resu_bitmask[adapter], adapter)
        return SparseMask.from_packed(self.resu_bitmask[adapter], self._rows().shape)

    def _own(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.resu_theta]

    def _overlay(self, names: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        for name in names:
            check_filled(self.resu_bitmask[name], name)
        return [self.resu_theta[name] for name in names], [self.resu_bitmask[name] for name in names]

    # -- use ------------------------------------------------------------------------------------------
    def forward(self, x: Tensor) -> Tensor:
        """What the base layer gives for ``x`` with ``W_eff`` as its weight."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.disable_adapters or self.merged else self._own(self.active_adapters)
        base = self._base
        if not names:
            y: Tensor = base(x)
            return y
        weight = self._rows()
        if weight.is_meta:
            raise RuntimeError("the base weight is offloaded (on the meta device); RESU needs it in memory")
        if isinstance(base, nn.Conv2d):
            return product(base, x, overlaid_weight(weight, *self._overlay(names)))
        return overlaid_linear(x, weight, base.bias, *self._overlay(names))

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """``(1 - M)⊙(Φ(θ) - W)``, of the shape of the base weight: what the adapter alone changes."""
        rows, mask = self._unmerged_rows(), self.mask_of(adapter)
        change = self.resu_theta[adapter].to(rows.dtype) - gather_theta(rows, mask)
        return as_weight(self._base, scatter_theta_(torch.zeros_like(rows), change, mask), self._base.weight.shape)

    # -- merging --------------------------------------------------------------------------------------
    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters into the base weight, in place.

        Args:
            safe_merge: Whether to look for NaN and infinities in θ first.
            adapter_names: Which; by default the active ones.

        Raises:
            ValueError: With ``safe_merge``, if there are such values; nothing is changed.
        """
        for adapter in self._own(check_adapters_to_merge(self, adapter_names)):
            mask, theta = self.mask_of(adapter), self.resu_theta[adapter].detach()
            if safe_merge and not bool(torch.isfinite(theta).all()):
                raise ValueError(f"adapter {adapter!r} holds NaN or infinite values and was not merged: it is broken")
            rows = self._rows()
            before, after = gather_theta(rows, mask), theta.to(rows.dtype)
            if self.merged_adapters:
                after = before + (after - gather_theta(self._unmerged_rows(), mask))
            self._write(after, mask)
            self.resu_before[adapter] = before
            self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back what merged adapters overwrote, bit for bit."""
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            self._write(self.resu_before[adapter], self.mask_of(adapter))
            del self.resu_before[adapter]  # type: ignore[no-untyped-call]

    def _write(self, values: Tensor, mask: SparseMask) -> None:
        rows, weight = self._rows(), self._base.weight.detach()
        scatter_theta_(rows, values.to(rows.device), mask)
        if rows.data_ptr() != weight.data_ptr():  # no view: channels_last
            weight.copy_(as_weight(self._base, rows, weight.shape))

    def _unmerged_rows(self) -> Tensor:
        """The base weight ``[out, in]`` without what is merged into it; a copy if something is."""
        rows = self._rows()
        if self.merged_adapters:
            rows = rows.clone()
            for adapter in reversed(self.merged_adapters):
                scatter_theta_(rows, self.resu_before[adapter], self.mask_of(adapter))
        return rows
