"""What a layer with sparse LoRA adapters holds, and how adapters are merged into its weight and taken out again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resu.core.enforcement import Constraint
from resu.core.mask import SparseMask, unpack_bits
from resu.core.quantization import pack_codes, quantize
from resu.core.resurrection import PackedRows, gather_active, row_offsets
from resu.kernels.masked_weight import LOW, MaskedWeight
from resu.pruning.sparse_lora.config import MODES, SparseLoRAConfig

__all__ = ["SparseLoRALayer"]

# Kept in their own precision whatever the layer is converted to.
_EXACT = ("scale", "zero")
_MERGED = "merged_adapters"


class SparseLoRALayer(nn.Module):
    """A layer whose frozen, masked weight has adapters beside it: the base of the kinds, without the products.

    ``weight`` and ``bias`` are the Parameters of the layer it was made of, under the same names. With ``base_bits`` the
    weight is held as codes of what is kept and mask bits, and ``weight`` reads as a dense tensor made for the occasion.

    Attributes:
        lora_A: ``{adapter: [r, in]}``, for convolutions ``[r, in / groups · kh · kw]``.
        lora_B: ``{adapter: [out, r]}``.
        configs: ``{adapter: SparseLoRAConfig}``.
        active: Names of the adapters that act (and train).
        enabled: Whether they act; False: the layer is its base.
        merged: Names of the adapters that are in the weight now.
    """

    bitmask: Tensor
    kept: Tensor | None
    codes: Tensor | None
    scale: Tensor | None
    zero: Tensor | None
    _like: Tensor

    # Whether the weight is stored inputs first.
    transposed: ClassVar[bool] = False

    def _init_lora(self, weight: nn.Parameter, mask: SparseMask, bits: int | None, hold: bool) -> None:
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.configs: dict[str, SparseLoRAConfig] = {}
        self.active: list[str] = []
        self.enabled = True
        self.merged: tuple[str, ...] = ()
        self.bits, self.hold = bits or 0, hold
        self._preserved = True  # whether the merged weight has the mask
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
        """Hold codes of what is kept instead of the weight, row by output row."""
        keep = mask.mask
        if self.transposed:
            weight, keep = weight.t(), keep.t()
        quantized = quantize(weight, self.bits, "per_channel", keep)
        self.codes = pack_codes(quantized.codes.reshape(-1)[keep.reshape(-1)], self.bits)
        self.scale, self.zero = quantized.scale, quantized.zero
        self.register_buffer("bitmask", SparseMask(keep).packed)
        self._parameters["weight"] = None

    # -- what is there --------------------------------------------------------------------------------
    @property
    def weight_shape(self) -> torch.Size:
        """Shape of the weight, also where it is packed."""
        return self._shape

    @property
    def mask(self) -> SparseMask:
        """The mask, in the weight's shape."""
        if not (self.bits and self.transposed):
            return SparseMask.from_packed(self.bitmask, self._shape)
        return SparseMask(SparseMask.from_packed(self.bitmask, self._shape[::-1]).mask.t())

    @property
    def mode(self) -> str:
        """The ``sparsity_mode`` of the adapters, which all have the same."""
        return next((config.sparsity_mode for config in self.configs.values()), "sparse_to_sparse")

    @property
    def _turned(self) -> bool:
        """Whether rows of the base are inputs."""
        return self.transposed and not self.bits

    def _base(self) -> MaskedWeight:
        if not self.bits:
            weight = self._parameters["weight"]
            assert weight is not None
            return MaskedWeight.dense(weight, self.bitmask)
        if self._offsets is None:  # derived: never saved or copied
            self._offsets = row_offsets(SparseMask.from_packed(self.bitmask, self._matrix_shape))
        assert self.codes is not None
        assert self.scale is not None
        assert self.zero is not None
        columns = self._matrix_shape[1:].numel()
        rows = PackedRows(self.codes, self.bitmask, self.scale, self.zero, self._offsets, columns, self.bits)
        return MaskedWeight.packed(rows)

    @property
    def _matrix_shape(self) -> torch.Size:
        return self._shape[::-1] if self.transposed else self._shape

    def _factors(self, names: Iterable[str], *, dropout: bool = False) -> tuple[Tensor, Tensor]:
        """``left`` and ``right`` of all these adapters together, as the operators take them."""
        a, b = [], []
        for name in names:
            config, down = self.configs[name], self.lora_A[name]
            if dropout and self.training and config.dropout:
                down = down * F.dropout(down.new_ones(config.r, 1), config.dropout)
            a.append(down)
            b.append(self.lora_B[name] * config.scale)
        n = self._matrix_shape
        right = torch.cat(a) if a else self._like.new_empty(0, n[1:].numel())
        left = torch.cat(b, dim=1) if b else self._like.new_empty(n[0], 0)
        return (right.t(), left.t()) if self._turned else (left, right)

    def _acting(self) -> list[str]:
        return self.active if self.enabled else []

    def effective_weight(self) -> Tensor:
        """The weight that acts in the forward pass now, dense, detached, in the weight's shape: for inspection."""
        out = self._like.new_empty(self._shape)
        weight = self._parameters["weight"]
        if self.merged:
            assert weight is not None
            return out.copy_(weight.detach())
        self._write(out, self._acting(), MODES[self.mode])
        return out

    @torch.no_grad()
    def _write(self, out: Tensor, names: Iterable[str], rule: str) -> None:
        view = out.t() if self.transposed and self.bits else out
        self._base().into_(view, *self._factors(names), rule)

    def __getattr__(self, name: str) -> Any:
        # Other code reads `layer.weight` for its dtype; not a leaf, so that no optimizer trains a copy.
        if name == "weight" and "_parameters" in self.__dict__ and self._parameters.get("weight") is None:
            out = self._like.new_empty(self._shape)
            self._write(out, [], "mask")
            return out
        return super().__getattr__(name)

    # -- adapters -------------------------------------------------------------------------------------
    def add_adapter(self, name: str, config: SparseLoRAConfig) -> None:
        """Add an adapter that changes nothing yet (A random, B zero) and make it the one that acts.

        Raises:
            ValueError: If there is one of this name, the name has a dot, or those there have another mode.
        """
        if not name or "." in name:
            raise ValueError(f"an adapter's name is a word without dots, got {name!r}")
        if name in self.configs:
            raise ValueError(f"there is an adapter {name!r} already; there are: {', '.join(self.configs)}")
        if self.configs and config.sparsity_mode != self.mode:
            raise ValueError(
                f"adapters of one layer have one mode: {config.sparsity_mode!r} given, and {self.mode!r} in use by "
                f"{', '.join(self.configs)}"
            )
        self.unmerge()
        out, columns = self._matrix_shape[0], self._matrix_shape[1:].numel()
        dtype = torch.float32 if self._like.dtype in LOW else self._like.dtype
        a = torch.empty(config.r, columns, dtype=dtype, device=self._like.device)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # as nn.Linear(in, r), and so LoRA
        self.lora_A[name] = nn.Parameter(a)
        self.lora_B[name] = nn.Parameter(a.new_zeros(out, config.r))
        self.configs[name] = config
        self.set_active([name])

    def set_active(self, names: Iterable[str]) -> None:
        """Say which adapters act, added up; only they require gradients. Takes merged ones out first."""
        wanted = list(dict.fromkeys(names))
        self._check(wanted)
        self.unmerge()
        self.active = wanted
        for name in self.configs:
            for parameter in (self.lora_A[name], self.lora_B[name]):
                parameter.requires_grad_(name in wanted)

    def enable(self, enabled: bool) -> None:
        """Let the active adapters act or not. Takes merged ones out first when it changes anything."""
        if enabled != self.enabled:
            self.unmerge()
        self.enabled = enabled

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter. Takes merged ones out first."""
        self._check([name])
        self.unmerge()
        del self.lora_A[name], self.lora_B[name], self.configs[name]
        self.active = [other for other in self.active if other != name]

    def _check(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.configs:
                raise ValueError(f"there is no adapter {name!r}; there are: {', '.join(self.configs) or 'none'}")

    # -- merging --------------------------------------------------------------------------------------
    @torch.no_grad()
    def merge(self, names: Iterable[str] | None = None, *, preserve_sparsity: bool = True) -> None:
        """Write ``W + K ⊙ s·BA`` into the weight: what the forward pass multiplies with, to the last bit.

        Of a packed base these are its dequantized values, which the adapter was trained on, never those it was
        quantized from. The base is kept to be restored bit for bit: its kept values ((1 - sparsity) of the weight's
        bytes), or the codes it is made of. Adapters that are merged already are taken out first.

        Args:
            names: Adapters; the active ones by default.
            preserve_sparsity: In ``sparse_to_dense``: whether the mask is laid on what is merged.

        Raises:
            ValueError: If there is no such adapter.
        """
        names = self._acting() if names is None else list(dict.fromkeys(names))
        self._check(names)
        self.unmerge()
        if not names:
            return
        rule = "mask" if preserve_sparsity and self.mode == "sparse_to_dense" else MODES[self.mode]
        weight = self._parameters["weight"]
        if weight is None:
            weight = nn.Parameter(self._like.new_empty(self._shape), requires_grad=False)
            self._write(weight, names, rule)
            self._parameters["weight"] = weight
        else:
            self.kept = gather_active(weight, self.mask)
            self._write(weight, names, rule)
        self.merged, self._preserved = tuple(names), rule != "dense"
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

    @torch.no_grad()
    def dropped(self, names: Iterable[str] | None = None) -> tuple[float, float]:
        """Squared norms: of what the mask takes away when these adapters are merged, and of the weight that acts."""
        names = self._acting() if names is None else list(names)
        if MODES[self.mode] != "dense" or not names:
            return 0.0, 1.0
        base = self._base()
        left, right = (factor.to(base.wide) for factor in self._factors(names))
        lost = total = 0.0
        for r0, r1 in base.tiles():
            tile = base.tile(left, right, r0, r1, "dense", base.wide)
            squares = tile.double().square_()
            all_of_it = float(squares.sum())
            total += all_of_it
            lost += all_of_it - float(base.mask_(squares, r0, r1).sum())
        return max(lost, 0.0), total

    def _rebuild(self) -> None:
        """Make what is derived anew: the constraint that holds the mask."""
        if self._constraint is not None:
            self._constraint.remove()
        weight = self._parameters["weight"]
        wanted = self.hold and weight is not None and self._preserved
        self._constraint = Constraint(weight, self.mask) if wanted and weight is not None else None

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
        given = dict(state_dict)
        note = given.pop(prefix + _MERGED, None)
        self.unmerge()
        if note is not None:
            problem = self._begin_merged(note, given.get(prefix + "kept"))
            if problem:
                args[-1].append(f"{prefix.rstrip('.') or 'layer'}: {problem}")
                return
        super()._load_from_state_dict(given, prefix, *args)
        self._offsets = None
        weight = self._parameters["weight"]
        if weight is not None and self._preserved:  # a state of the dense model is one too
            self.mask.apply_(weight)
        self._rebuild()

    def _begin_merged(self, note: Tensor, kept: Tensor | None) -> str | None:
        """Make room for a state that was merged when it was saved; or what is wrong with it."""
        try:
            read = json.loads(bytes(note.tolist()))
            names, preserved = tuple(read["adapters"]), bool(read["preserved"])
            self._check(names)
        except (ValueError, TypeError, KeyError) as error:
            return f"{_MERGED} cannot be read: {error}"
        if not self.bits and kept is None:
            return f"the state has merged adapters ({', '.join(names)}) and not what the base weight was ('kept')"
        self.merged, self._preserved = names, preserved
        if self.bits:
            self._parameters["weight"] = nn.Parameter(self._like.new_empty(self._shape), requires_grad=False)
        else:
            assert kept is not None
            self.kept = self._like.new_empty(kept.shape)
        return None

    def extra_repr(self) -> str:
        """The layer's sizes, its sparsity and its adapters."""
        parts = [super().extra_repr(), f"sparsity={self.mask.sparsity:.4f}", f"mode={self.mode}"]
        parts += [f"base_bits={self.bits}"] if self.bits else []
        parts += [f"adapters={list(self.configs)}", f"active={self._acting()}"]
        return ", ".join(part for part in [*parts, f"merged={list(self.merged)}" if self.merged else ""] if part)


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
