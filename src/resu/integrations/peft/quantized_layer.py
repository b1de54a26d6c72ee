"""A target layer under QRESU: codes of the kept weights, mask bits, scales and θ; the dense weight is freed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from resu.core.mask import SparseMask
from resu.core.quantization import pack_codes, quantize
from resu.core.resurrection import PackedRows, gather_active, row_offsets
from resu.integrations.peft.buffers import Exact
from resu.integrations.peft.geometry import as_weight, padded_input, rows_and_columns
from resu.integrations.peft.loading import check_filled, check_shapes, make_room, read_mask
from resu.modules.assembled import assembled_conv2d, assembled_linear, assembled_weight

__all__ = ["QRESULayer"]

_PARTS = ("qresu_bitmask", "qresu_codes", "qresu_scale", "qresu_zero")


class QRESULayer(nn.Module, BaseTunerLayer):
    """What PEFT puts in the place of a target: ``W_eff = M⊙dequantized + Φ(θ)``, put together row by row.

    ``base_layer.weight`` is emptied (the Parameter stays, with no elements) until the adapter is merged; unmerging
    empties it again, and the packed values are the same bits as before. Without its adapter there is no weight, so it
    cannot be switched off.

    Attributes:
        qresu_theta: ``{adapter: θ}``, ``[p]``, row-major over ``[out, in]``.
        qresu_bitmask: ``{adapter: mask bits}``; ``qresu_codes``, ``qresu_scale``, ``qresu_zero`` likewise, as
            :class:`resu.core.resurrection.PackedRows` has them.
        shape: Shape of the weight that was freed.
        bits: 4 or 8.
    """

    adapter_layer_names = ("qresu_theta",)
    other_param_names = _PARTS

    def __init__(self, base_layer: nn.Module, bits: int, qscheme: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bits, self.qscheme = bits, qscheme
        weight = self._base.weight
        self.shape = weight.shape
        self.rows, self.columns = rows_and_columns(base_layer, weight).shape
        self.qresu_theta = nn.ParameterDict()
        for part in _PARTS:
            setattr(self, part, Exact())
        self._offsets: Tensor | None = None  # kept values before each row, on the CPU
        self.register_load_state_dict_post_hook(_loaded)  # type: ignore[no-untyped-call]
        self.merged_adapters: list[str] = []
        self._disable_adapters = False

    # -- the adapter ----------------------------------------------------------------------------------
    @torch.no_grad()
    def add(self, adapter: str, mask: SparseMask | None, theta: Tensor | None) -> None:
        """Quantize the kept weights and free the dense weight; without a mask the layer is empty until a file comes."""
        weight = self._base.weight
        if mask is None or theta is None:
            byte = torch.empty(0, dtype=torch.uint8, device=weight.device)
            wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
            bits, codes, theta = byte.view(0, 0), byte, weight.new_empty(0)
            scale = zero = torch.empty(0, dtype=wide, device=weight.device)
        else:
            quantized = quantize(rows_and_columns(self._base, weight.detach()), self.bits, self.qscheme, mask.mask)
            bits, codes = mask.packed, pack_codes(gather_active(quantized.codes, mask), self.bits)
            scale, zero = quantized.scale, quantized.zero
        self.qresu_theta[adapter] = nn.Parameter(theta)
        for part, tensor in zip(_PARTS, (bits, codes, scale, zero), strict=True):
            getattr(self, part)[adapter] = tensor
        self._derive()
        self._free()

    def parts(self) -> tuple[str, ...]:
        """Names of the tensors of an adapter in its file."""
        return ("qresu_theta", *_PARTS)

    def expect(self, adapter: str, given: Mapping[str, Tensor], name: str) -> None:
        """Make room for the tensors of an adapter file.

        Raises:
            ValueError: If they do not belong to a weight of this shape, or together.
        """
        mask = read_mask(given["qresu_bitmask"], (self.rows, self.columns), name)
        scales = (self.rows if self.qscheme == "per_channel" else 1,)
        codes = mask.n_active if self.bits == 8 else (mask.n_active + 1) // 2
        shapes = {"qresu_theta": (mask.n_pruned,), "qresu_codes": (codes,), "qresu_scale": scales, "qresu_zero": scales}
        check_shapes(name, given, shapes)
        for part in self.parts():
            make_room(getattr(self, part), adapter, given[part])

    @property
    def _base(self) -> Any:
        return self.get_base_layer()

    @property
    def _adapter(self) -> str:
        return next(iter(self.qresu_theta))

    def _mask(self) -> SparseMask:
        entries: Any = self.qresu_bitmask
        return SparseMask.from_packed(entries[self._adapter], (self.rows, self.columns))

    def _derive(self) -> None:
        entries: Any = self.qresu_bitmask
        self._offsets = row_offsets(self._mask()) if entries[self._adapter].numel() else None

    def _packed(self) -> PackedRows:
        bits, codes, scale, zero = (getattr(self, part)[self._adapter] for part in _PARTS)
        check_filled(bits, self._adapter)
        assert self._offsets is not None
        return PackedRows(codes, bits, scale, zero, self._offsets, self.columns, self.bits)

    def _free(self) -> None:
        weight = self._base.weight
        weight.grad = None
        # What nn.Module.to() does, for the same reason: the object stays known to others.
        weight.data = weight.data.new_empty(0)

    # -- use ------------------------------------------------------------------------------------------
    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapter on; off is refused.

        Raises:
            RuntimeError: If ``enabled`` is False.
        """
        if not enabled:
            raise RuntimeError(
                "QRESU cannot be switched off: the base weight was quantized and freed, so the base model is not "
                "there. Load the base model beside it, or use RESU, which keeps it"
            )
        super().enable_adapters(enabled)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with ``W_eff`` as its weight."""
        base = self._base
        if self.merged:
            y: Tensor = base(x)
            return y
        if self._adapter not in self.active_adapters:
            raise RuntimeError(
                f"adapter {self._adapter!r} is not active, and its layer has no other weight: QRESU freed it. Call "
                f"set_adapter({self._adapter!r})"
            )
        rows = self._packed()
        theta, dtype = self.qresu_theta[self._adapter], base.weight.dtype
        if not isinstance(base, nn.Conv2d):
            return assembled_linear(x, theta, base.bias, rows, dtype)
        padded, padding = padded_input(base, x)
        return assembled_conv2d(
            padded, theta, base.bias, rows, dtype, base.kernel_size, base.stride, padding, base.dilation, base.groups
        )

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """``W_eff`` as a dense tensor of the base weight's shape and dtype."""
        rows, theta = self._packed(), self.qresu_theta[self._adapter]
        weight = assembled_weight(theta, rows, self._mask(), self._base.weight.dtype)
        return as_weight(self._base, weight, self.shape)

    # -- merging --------------------------------------------------------------------------------------
    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make the dense weight that was trained, in the base layer.

        Args:
            safe_merge: Whether to look for NaN and infinities in θ first.
            adapter_names: The adapter's name; by default the active one.

        Raises:
            ValueError: With ``safe_merge``, if there are such values; nothing is changed.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.qresu_theta:
                continue
            if safe_merge and not bool(torch.isfinite(self.qresu_theta[adapter]).all()):
                raise ValueError(f"adapter {adapter!r} holds NaN or infinite values and was not merged: it is broken")
            self._base.weight.data = self.effective_weight().contiguous()
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Free the dense weight again."""
        if self.merged:
            self.merged_adapters.clear()
            self._free()


def _loaded(layer: QRESULayer, incompatible: object) -> None:
    """Mask bits have come from a state."""
    layer._derive()
