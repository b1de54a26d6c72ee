"""The frozen, masked weight under adapters: dense with zeros or packed, with something merged into it or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from resu.core.enforcement import Constraint
from resu.core.mask import SparseMask, unpack_bits
from resu.core.quantization import pack_codes, quantize
from resu.core.resurrection import PackedRows, gather_active, row_offsets
from resu.kernels.masked_weight import MaskedWeight

__all__ = ["HeldBase"]

# Kept in their own precision whatever the layer is converted to.
_EXACT = ("scale", "zero")
_MERGED = "merged_adapters"


class HeldBase(nn.Module):
    """A layer's base weight and its mask, and what is saved of them; without adapters.

    Attributes:
        bitmask: Mask bits of the weight; of a packed ``Conv1D`` those of its transpose ``[out, in]``.
        bits: 4 or 8 where the weight is packed, else 0.
        hold: Whether the mask is held under any optimizer.
        merged: Names of the adapters that are in the weight now.
        kept: While something is merged into a dense weight: its former values at active positions.
    """

    bitmask: Tensor
    kept: Tensor | None
    codes: Tensor | None
    scale: Tensor | None
    zero: Tensor | None
    _like: Tensor

    # Whether the weight is stored inputs first.
    transposed: ClassVar[bool] = False

    def _init_base(self, weight: nn.Parameter, mask: SparseMask, bits: int | None, hold: bool) -> None:
        self.bits, self.hold = bits or 0, hold
        self.merged: tuple[str, ...] = ()
        self._preserved = True  # whether what is merged has the mask
        self._offsets: Tensor | None = None
        self._constraint: Constraint | None = None
        self._shape = torch.Size(weight.shape)
        self.register_buffer("_like", weight.new_empty(0), persistent=False)  # dtype and device, also without a weight
        for name in ("kept", "codes", "scale", "zero"):
            self.register_buffer(name, None)
        mask = mask.to(weight.device)
        mask.apply_(weight)
        weight.requires_grad_(False)
        weight.grad = None
        if self.bits:
            self._pack(weight.detach(), mask)
        else:
            self._parameters["weight"] = weight
            self.register_buffer("bitmask", mask.packed)
        self._rebuild()

    def _pack(self, weight: Tensor, mask: SparseMask) -> None:
        """Hold codes of what is kept instead of the weight, with a scale per output row."""
        keep = mask.mask
        if self.transposed:
            weight, keep = weight.t(), keep.t()
        quantized = quantize(weight, self.bits, "per_channel", keep)
        own = SparseMask(keep) if self.transposed else mask
        self.codes = pack_codes(gather_active(quantized.codes, own), self.bits)
        self.scale, self.zero = quantized.scale, quantized.zero
        self.register_buffer("bitmask", own.packed)
        self._parameters["weight"] = None

    # -- what is there --------------------------------------------------------------------------------
    @property
    def weight_shape(self) -> torch.Size:
        """Shape of the weight, also where it is packed."""
        return self._shape

    @property
    def matrix_shape(self) -> torch.Size:
        """Outputs first: the weight's shape, but of a ``Conv1D`` ``[out, in]``."""
        return self._shape[::-1] if self.transposed else self._shape

    @property
    def mask(self) -> SparseMask:
        """The mask, in the weight's shape."""
        if not (self.bits and self.transposed):
            return SparseMask.from_packed(self.bitmask, self._shape)
        return SparseMask(SparseMask.from_packed(self.bitmask, self.matrix_shape).mask.t())

    @property
    def _inputs_first(self) -> bool:
        """Whether rows of :meth:`_base` are inputs; a packed base always has outputs first."""
        return self.transposed and not self.bits

    def _base(self) -> MaskedWeight:
        """The base as operators take it. A dense weight must have nothing merged into it."""
        if not self.bits:
            weight = self._parameters["weight"]
            assert weight is not None
            return MaskedWeight.dense(weight, self.bitmask)
        assert self.codes is not None
        assert self.scale is not None
        assert self.zero is not None
        assert self._offsets is not None
        columns = self.matrix_shape[1:].numel()
        rows = PackedRows(self.codes, self.bitmask, self.scale, self.zero, self._offsets, columns, self.bits)
        return MaskedWeight.packed(rows)

    def __getattr__(self, name: str) -> Any:
        # Other code reads `layer.weight` for its dtype; not a leaf, so that no optimizer trains a copy.
        if name == "weight" and "_parameters" in self.__dict__ and self._parameters.get("weight") is None:
            nothing = self._like.new_empty(0)
            rows, columns = self.matrix_shape[0], self.matrix_shape[1:].numel()
            return self._written(nothing.view(rows, 0), nothing.view(0, columns), "mask")
        return super().__getattr__(name)

    @torch.no_grad()
    def _written(self, left: Tensor, right: Tensor, rule: str, into: Tensor | None = None) -> Tensor:
        """``W + K ⊙ (left @ right)`` in the weight's shape and dtype, in new memory or in ``into``."""
        out = self._like.new_empty(self._shape) if into is None else into
        self._base().into_(out.t() if self.transposed and self.bits else out, left, right, rule)
        return out

    # -- merging --------------------------------------------------------------------------------------
    @torch.no_grad()
    def _merge_in(self, names: tuple[str, ...], left: Tensor, right: Tensor, rule: str) -> None:
        weight = self._parameters["weight"]
        if weight is None:
            self._parameters["weight"] = nn.Parameter(self._written(left, right, rule), requires_grad=False)
        else:
            self.kept = gather_active(weight, self.mask)
            self._written(left, right, rule, into=weight)
        self.merged, self._preserved = names, rule != "dense"
        self._rebuild()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all merged adapters out: the base weight is what it was, bit for bit."""
        if not self.merged:
            return
        weight = self._parameters["weight"]
        assert weight is not None
        if self.bits:
            self._parameters["weight"] = None
        else:
            assert self.kept is not None
            _put_active_(weight, self.kept, self._base())
        self.kept, self.merged, self._preserved = None, (), True
        self._rebuild()

    # -- holding the mask -----------------------------------------------------------------------------
    def _rebuild(self) -> None:
        """Make what is derived anew: the constraint that holds the mask, and where rows of codes start."""
        if self._constraint is not None:
            self._constraint.remove()
        weight = self._parameters["weight"]
        wanted = self.hold and self._preserved
        self._constraint = Constraint(weight, self.mask) if wanted and weight is not None else None
        if self.bits and self._offsets is None:
            self._offsets = row_offsets(SparseMask.from_packed(self.bitmask, self.matrix_shape))

    def watch_calls(self) -> None:
        """Keep ``nn.TransformerEncoderLayer`` from multiplying with ``weight`` itself instead of calling the layer.

        In inference it does so (its fast path) unless something waits for the call.
        """
        self.register_forward_pre_hook(_called)

    def let_go(self) -> None:
        """Hold the mask no more, and be called or not."""
        self.hold = False
        self._rebuild()
        for key in [key for key, hook in self._forward_pre_hooks.items() if hook is _called]:
            del self._forward_pre_hooks[key]

    # -- nn.Module's own ways -------------------------------------------------------------------------
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = {name: value.dtype for name in _EXACT if (value := getattr(self, name)) is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, dtype in exact.items():
            setattr(self, name, getattr(self, name).to(dtype))
        self._rebuild()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_constraint": None, "_offsets": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._rebuild()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            text = json.dumps({"adapters": self.merged, "preserved": self._preserved}).encode()
            destination[prefix + _MERGED] = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # args: local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        given = dict(state_dict)
        note = given.pop(prefix + _MERGED, None)
        self.unmerge()
        if note is not None:
            problem = self._expect_merged(note, given.get(prefix + "kept"), given.get(prefix + "bitmask"))
            if problem:
                args[-1].append(f"{prefix.rstrip('.') or 'layer'}: {problem}")
                return
        super()._load_from_state_dict(given, prefix, *args)
        self._offsets = None
        weight = self._parameters["weight"]
        if weight is not None and self._preserved:  # a state of the dense model is one too
            self.mask.apply_(weight)
        self._rebuild()

    def _expect_merged(self, note: Tensor, kept: Tensor | None, bitmask: Tensor | None) -> str | None:
        """Make room for a state that was merged when it was saved; or what is wrong with it."""
        try:
            read = json.loads(bytes(note.tolist()))
            names, preserved = tuple(read["adapters"]), bool(read["preserved"])
            self._check(names)
        except (ValueError, TypeError, KeyError) as error:
            return f"{_MERGED} cannot be read: {error}"
        if self.bits:
            self._parameters["weight"] = nn.Parameter(self._like.new_empty(self._shape), requires_grad=False)
        else:
            mask = self.mask if bitmask is None else SparseMask.from_packed(bitmask, self._shape)
            if kept is None or kept.shape != (mask.n_active,):
                what = "is missing" if kept is None else f"has shape {tuple(kept.shape)}"
                return f"adapters are merged in the state, and 'kept' (the base's {mask.n_active} kept values) {what}"
            self.kept = self._like.new_empty(kept.shape)
        self.merged, self._preserved = names, preserved
        return None

    def _check(self, names: tuple[str, ...]) -> None:
        """Raise ``ValueError`` unless there are these adapters."""
        raise NotImplementedError


def _called(module: nn.Module, args: Any) -> None:
    """Does nothing: that it is there is what counts."""


def _put_active_(weight: Tensor, kept: Tensor, base: MaskedWeight) -> None:
    """Write kept values back, and +0.0 elsewhere, tile by tile."""
    done = 0
    for r0, r1 in base.tiles():
        rows = weight[r0:r1]
        bits = unpack_bits(base.bitmask[r0:r1], rows.shape)
        values = kept[done : done + int(bits.sum())]
        rows.zero_().masked_scatter_(bits, values)
        done += values.numel()
