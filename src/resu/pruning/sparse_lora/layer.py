"""A layer with sparse LoRA adapters, without the products, which each kind of layer has its own of."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resu.core.mask import SparseMask
from resu.core.sharding import is_sharded
from resu.kernels.masked_weight import LOW
from resu.pruning.sparse_lora.config import MODES, SparseLoRAConfig
from resu.pruning.sparse_lora.held import HeldBase

__all__ = ["SparseLoRALayer"]


class SparseLoRALayer(HeldBase):
    """A layer whose frozen, masked weight has adapters beside it.

    ``weight`` and ``bias`` are the Parameters of the layer it was made of, under the same names. With ``base_bits`` the
    weight is held as codes of what is kept and mask bits, and ``weight`` reads as a dense tensor made for the occasion.

    Attributes:
        lora_A: ``{adapter: [r, in]}``, for convolutions ``[r, in / groups · kh · kw]``.
        lora_B: ``{adapter: [out, r]}``.
        configs: ``{adapter: SparseLoRAConfig}``.
        active: Names of the adapters that act (and train).
        enabled: Whether they act; False: the layer is its base.
    """

    def _init_lora(self, weight: nn.Parameter, mask: SparseMask, bits: int | None, hold: bool) -> None:
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.configs: dict[str, SparseLoRAConfig] = {}
        self.active: list[str] = []
        self.enabled = True
        self._init_base(weight, mask, bits, hold)

    @property
    def mode(self) -> str:
        """The ``sparsity_mode`` of the adapters, which all have the same."""
        return next((config.sparsity_mode for config in self.configs.values()), "sparse_to_sparse")

    def _acting(self) -> list[str]:
        return self.active if self.enabled else []

    def _factors(self, names: Iterable[str], *, dropout: bool = False) -> tuple[Tensor, Tensor]:
        """``left`` and ``right`` of all these adapters together, as the operators take them."""
        a, b = [], []
        for name in names:
            config, down = self.configs[name], self.lora_A[name]
            if dropout and self.training and config.dropout:
                down = down * F.dropout(down.new_ones(config.r, 1), config.dropout)
            a.append(down)
            b.append(self.lora_B[name] * config.scale)
        rows, columns = self.matrix_shape[0], self.matrix_shape[1:].numel()
        right = torch.cat(a) if a else self._like.new_empty(0, columns)
        left = torch.cat(b, dim=1) if b else self._like.new_empty(rows, 0)
        return (right.t(), left.t()) if self._inputs_first else (left, right)

    def effective_weight(self) -> Tensor:
        """The weight that acts in the forward pass now, dense, detached, in the weight's shape: for inspection."""
        if self.merged:
            weight: Tensor = self.weight
            return weight.detach().clone()
        return self._written(*self._factors(self._acting()), MODES[self.mode])

    # -- adapters -------------------------------------------------------------------------------------
    def add_adapter(self, name: str, config: SparseLoRAConfig) -> None:
        """Add an adapter that changes nothing yet (A random, B zero) and make it the one that acts.

        Its factors are float32 where the weight has 16 bits, else of the weight's dtype.

        Raises:
            ValueError: If there is one of this name, the name cannot be one, or those there have another mode.
        """
        check_adapter_name(name)
        if name in self.configs:
            raise ValueError(f"there is an adapter {name!r} already; there are: {', '.join(self.configs)}")
        if self.configs and config.sparsity_mode != self.mode:
            raise ValueError(
                f"adapters of one layer have one mode: {config.sparsity_mode!r} given, and {self.mode!r} in use by "
                f"{', '.join(self.configs)}"
            )
        self.unmerge()
        rows, columns = self.matrix_shape[0], self.matrix_shape[1:].numel()
        dtype = torch.float32 if self._like.dtype in LOW else self._like.dtype
        a = torch.empty(config.r, columns, dtype=dtype, device=self._like.device)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # as nn.Linear(in, r), and so LoRA
        self.lora_A[name] = nn.Parameter(a)
        self.lora_B[name] = nn.Parameter(a.new_zeros(rows, config.r))
        self.configs[name] = config
        self.set_active([name])

    def set_active(self, names: Iterable[str]) -> None:
        """Say which adapters act, added up; only they require gradients. Takes merged ones out first."""
        wanted = tuple(dict.fromkeys(names))
        self._check(wanted)
        self.unmerge()
        self.active = list(wanted)
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
        self._check((name,))
        self.unmerge()
        del self.lora_A[name], self.lora_B[name], self.configs[name]
        self.active = [other for other in self.active if other != name]

    def _check(self, names: tuple[str, ...]) -> None:
        for name in names:
            if name not in self.configs:
                raise ValueError(f"there is no adapter {name!r}; there are: {', '.join(self.configs) or 'none'}")

    # -- merging --------------------------------------------------------------------------------------
    def merge(self, names: Iterable[str] | None = None, *, preserve_sparsity: bool = True) -> None:
        """Write ``W + K ⊙ s·BA`` into the weight: what the forward pass multiplies with, to the last bit.

        Of a packed base these are its dequantized values, which the adapter was trained on, never those it was
        quantized from. The base is kept to be restored bit for bit: its kept values ((1 - sparsity) of the weight's
        bytes), or the codes it is made of. What was merged before is taken out first; while something is merged, that
        is what acts, whatever :attr:`active` says.

        Args:
            names: Adapters; those that act, by default.
            preserve_sparsity: In ``sparse_to_dense``: whether the mask is laid on what is merged.

        Raises:
            ValueError: If there is no such adapter.
            RuntimeError: If parameters are sharded over ranks.
        """
        wanted = tuple(dict.fromkeys(self._acting() if names is None else names))
        self._check(wanted)
        self.unmerge()
        if wanted:
            self._require_whole(wanted)
            rule = "mask" if preserve_sparsity and self.mode == "sparse_to_dense" else MODES[self.mode]
            with torch.no_grad():
                self._merge_in(wanted, *self._factors(wanted), rule)

    def _require_whole(self, names: tuple[str, ...]) -> None:
        if any(is_sharded(self.lora_A[name]) for name in names):
            raise RuntimeError(
                "adapters are sharded over ranks, and are merged whole: gather the state (full_tensor, or "
                "get_model_state_dict with full_state_dict=True), load it into an unsharded model, and merge there"
            )

    @torch.no_grad()
    def dropped(self, names: Iterable[str] | None = None) -> tuple[float, float]:
        """Squared norms: of what the mask takes away when these adapters are merged, and of the weight that acts.

        Of the base and the adapters as they are, so merged ones are taken out first.
        """
        wanted = tuple(self._acting() if names is None else names)
        if MODES[self.mode] != "dense" or not wanted:
            return 0.0, 1.0
        self.unmerge()
        self._require_whole(wanted)
        base = self._base()
        left, right = (factor.to(base.wide) for factor in self._factors(wanted))
        lost = total = 0.0
        for r0, r1 in base.tiles():
            squares = base.tile(left, right, r0, r1, "dense", base.wide).double().square_()
            whole = float(squares.sum())
            total += whole
            lost += max(whole - float(base.mask_(squares, r0, r1).sum()), 0.0)
        return lost, total

    def extra_repr(self) -> str:
        """The layer's sizes, its sparsity and its adapters."""
        parts = [super().extra_repr(), f"sparsity={self.mask.sparsity:.4f}", f"mode={self.mode}"]
        parts += [f"base_bits={self.bits}"] if self.bits else []
        parts += [f"adapters={list(self.configs)}", f"active={self._acting()}"]
        return ", ".join(part for part in [*parts, f"merged={list(self.merged)}" if self.merged else ""] if part)


def check_adapter_name(name: str) -> None:
    """Raise ``ValueError`` unless a name can be one of an adapter: it becomes part of parameter names."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ParameterDict, name):
        raise ValueError(f"an adapter's name is a word without dots, and none of a method's; got {name!r}")
