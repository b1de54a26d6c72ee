"""Layers in their modes within a dry run: of the right shapes and dtypes, with masks that are counts alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from resu.core.counting import keep_count
from resu.core.mask import SparseMask
from resu.modules.base import RESUModule
from resu.modules.settings import RESUMode, Settings
from resu.pruning.sparse_lora.config import SparseLoRAConfig
from resu.pruning.sparse_lora.kinds import to_sparse_lora
from resu.pruning.sparse_lora.layer import SparseLoRALayer

__all__ = ["DryMask", "dry_lora", "enter_dry"]


class DryMask(SparseMask):
    """A mask of which shape and count are known, and no position: what acts on single positions does nothing.

    Args:
        shape: Of the weight.
        sparsity: In [0, 1).
    """

    __slots__ = ()

    def __init__(self, shape: Sequence[int], sparsity: float) -> None:
        rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
        self._shape = torch.Size(shape)
        self._packed = torch.empty(rows, -(-columns // 8), dtype=torch.uint8)
        self._n_active = keep_count(rows * columns, sparsity)
        self._unpacked = None

    @property
    def mask(self) -> Tensor:
        """Nothing: NumPy makes the bits, and its memory is not counted."""
        return torch.empty(0, dtype=torch.bool)

    def to(self, device: torch.device | str) -> SparseMask:
        """Itself: all that is dry lies in one place."""
        return self

    def apply_(self, x: Tensor) -> Tensor:
        """As it is."""
        return x

    def zero_(self, x: Tensor, *, active: bool = False) -> Tensor:
        """As it is."""
        return x

    def restore_(self, x: Tensor, before: Tensor) -> Tensor:
        """As it is."""
        return x


def enter_dry(
    layer: RESUModule,
    mode: RESUMode,
    sparsity: float,
    *,
    bits: int = 4,
    theta_dtype: torch.dtype | None = None,
) -> None:
    """Prune a DENSE layer and take it to a mode within :func:`resu.modules.dry_run.dry_run`.

    Args:
        layer: In mode DENSE.
        mode: SPARSE, RESU, QRESU or QRESU_SELECTIVE.
        sparsity: In [0, 1).
        bits: 4 or 8, in the quantized modes.
        theta_dtype: Of θ in the quantized modes; that of the weight by default.

    Example:
        >>> from resu import RESULinear
        >>> from resu.modules.dry_run import dry_run
        >>> with dry_run() as run:
        ...     layer = RESULinear(4096, 4096, bias=False)
        ...     enter_dry(layer, RESUMode.QRESU, 0.5, theta_dtype=torch.bfloat16)
        >>> round(run.held / 4096**2, 2)  # half a byte per kept weight, two per pruned one, a bit for the mask
        1.38
    """
    layer._require("enter_dry", RESUMode.DENSE)
    mask = DryMask(layer.weight_shape, sparsity)
    settings = Settings(mode=mode, bits=bits, theta_dtype=theta_dtype or layer.weight_dtype)
    if not mode.quantized:
        layer._settings, layer._sparse_mask, layer.bitmask = settings, mask, mask.packed
    if mode is RESUMode.SPARSE:
        return  # its constraint holds no tensor
    if mode is RESUMode.RESU:
        layer.weight.requires_grad_(True)
        layer._checksum = (0, 0)
        layer._rebuild()
        return
    rows = layer.weight_shape[0]
    exact = torch.float64 if layer.weight_dtype == torch.float64 else torch.float32
    layer._offsets = torch.empty(rows + 1, dtype=torch.int32 if mask.n_active < 2**31 else torch.int64)
    codes = torch.empty(-(-mask.n_active * bits // 8), dtype=torch.uint8)
    scale, zero = torch.empty(rows, dtype=exact), torch.empty(rows, dtype=exact)
    theta = torch.empty(mask.n_pruned, dtype=settings.theta_dtype)
    # The update by the layer itself selects positions by value: its hook is one that holds what that holds.
    layer._install_quantized(Settings(**{**vars(settings), "mode": RESUMode.QRESU}), mask, codes, scale, zero, theta)
    if mode is RESUMode.QRESU_SELECTIVE:
        layer._make_averages(theta)
        layer._theta_parameter().register_post_accumulate_grad_hook(_selective_update)


def dry_lora(module: nn.Module, config: SparseLoRAConfig, adapter: str = "default") -> SparseLoRALayer:
    """A layer with a sparse LoRA adapter within a dry run, in place of what ``apply_sparse_lora`` makes.

    Args:
        module: ``nn.Linear``, ``nn.Conv2d`` or Hugging Face ``Conv1D``.
        config: Its rank, mode, sparsity and bits are looked at.
        adapter: Its name.
    """
    weight = module._parameters["weight"]
    assert weight is not None
    mask = DryMask(weight.shape, config.initial_sparsity)
    layer = to_sparse_lora(module, mask, hold=False)
    if config.base_bits:
        rows = layer.matrix_shape[0]
        exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
        layer.bits = config.base_bits
        layer.codes = torch.empty(-(-mask.n_active * layer.bits // 8), dtype=torch.uint8)
        layer.scale, layer.zero = torch.empty(rows, dtype=exact), torch.empty(rows, dtype=exact)
        layer.bitmask = DryMask(layer.matrix_shape, config.initial_sparsity).packed
        layer._offsets = torch.empty(rows + 1, dtype=torch.int32 if mask.n_active < 2**31 else torch.int64)
        layer._parameters["weight"] = None
    layer.add_adapter(adapter, config)
    return layer


def _selective_update(theta: Tensor) -> None:
    """What ``selective_update_`` makes: the gradient in the averages' precision, consistency, sizes, a choice."""
    assert theta.grad is not None
    grad: Tensor | nn.Parameter = theta.grad
    theta.grad = None
    wide = grad.to(torch.float64 if grad.dtype == torch.float64 else torch.float32)
    stability = torch.empty_like(wide)
    size = wide.abs()
    chosen = stability > 0
    ordered = size + 1  # those that may be chosen, and what the selection of the largest of them copies
    narrowed, sorted_, taken = ordered.clone(), ordered.clone(), ordered > 0
    del stability, size, chosen, ordered, narrowed, sorted_, taken
