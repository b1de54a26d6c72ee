"""A sparse forward pass through torch's CSR tensors, where it is safe and pays.

Only in inference on the CPU in float32 or float64. The CSR is built from the **mask** (kept zeros stay) with
int32 indices; ``F.linear`` is the faster call below a batch of 8 and ``torch.sparse.mm`` above.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from resu.core.counting import positions, pruned_count
from resu.core.mask import SparseMask
from resu.core.resurrection import row_offsets

if TYPE_CHECKING:
    from resu.modules.held import HeldWeight

__all__ = ["AUTO_THRESHOLD", "SparseProduct", "check_threshold", "sparse_linear"]

# "auto": from here on CSR was faster than the dense product in three of four rounds at every batch size up to this
# one (benchmarks/bench_sparse_forward.py, one thread), for layers of at least this many weights.
AUTO_THRESHOLD = 0.9
AUTO_NUMEL = 1 << 20
AUTO_BATCH = 128
_SAMPLES = 1024


def check_threshold(value: float | str) -> float | str:
    """Return ``value`` if it is ``"auto"`` or a number in [0, 1]."""
    if value == "auto":
        return value
    if isinstance(value, (str, bool)) or not isinstance(value, (int, float)):
        raise TypeError(f"sparse_threshold must be 'auto' or a number in [0, 1], got {value!r}")
    if math.isnan(value) or not 0.0 <= value <= 1.0:
        raise ValueError(f"sparse_threshold must lie in [0, 1], got {value!r}")
    return value


class SparseProduct:
    """The CSR form of one weight as it was when built; :meth:`stale` says whether that still holds."""

    def __init__(self, weight: Tensor, mask: SparseMask) -> None:
        rows, columns = weight.shape
        index = positions(mask.mask)
        values = weight.detach().reshape(-1).index_select(0, index)
        self.version, self.pointer, self.mask = weight._version, weight.data_ptr(), mask
        self.csr = torch.sparse_csr_tensor(
            row_offsets(mask).to(torch.int32),
            (index % columns).to(torch.int32),
            values,
            (rows, columns),
            check_invariants=False,
        )
        # Writes through `.data` do not count as versions; nearly all of them show in a sample.
        step = max(1, values.numel() // _SAMPLES)
        self.sample_at, self.sample = index[::step].clone(), values[::step].clone()

    def stale(self, weight: Tensor, mask: SparseMask) -> bool:
        """Whether the weight or the mask has changed since."""
        if weight._version != self.version or weight.data_ptr() != self.pointer or mask is not self.mask:
            return True
        return not torch.equal(weight.detach().view(-1).index_select(0, self.sample_at), self.sample)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        parts = (
            self.csr.crow_indices(),
            self.csr.col_indices(),
            self.csr.values(),
            self.sample_at,
            self.sample,
        )
        return sum(part.nbytes for part in parts)


def _applies(layer: HeldWeight, x: Tensor, weight: Tensor, mask: SparseMask) -> bool:
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or x.dtype != weight.dtype:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    if torch.is_autocast_enabled("cpu") or weight.is_inference() or not weight.is_contiguous():
        return False
    if type(x) is not Tensor or x.numel() == 0 or x.shape[-1] != weight.shape[1]:
        return False
    if layer.sparse_threshold == "auto":
        small = x.numel() // weight.shape[1] <= AUTO_BATCH
        return small and mask.numel >= AUTO_NUMEL and _reaches(mask, AUTO_THRESHOLD)
    return _reaches(mask, float(layer.sparse_threshold))


def _reaches(mask: SparseMask, threshold: float) -> bool:
    """Whether pruning at ``threshold`` would remove no more: 0.9 of 1024² counts as 0.9, though it is 0.8999996."""
    if threshold == 1.0:
        return mask.n_active == 0
    return mask.n_pruned >= pruned_count(mask.numel, threshold)


def sparse_linear(layer: HeldWeight, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """``F.linear(x, weight, bias)`` through CSR, or None where the dense product is to be used."""
    mask = layer.mask
    if mask is None or torch.compiler.is_compiling() or not _applies(layer, x, weight, mask):
        return None
    # torch's CSR calls fail on inference tensors; outside inference mode they take them.
    with torch.inference_mode(False), torch.no_grad():
        product = layer._product
        if product is None or product.stale(weight, mask):
            product = layer._product = SparseProduct(weight, mask)
        flat = x.reshape(-1, weight.shape[1])
        if flat.shape[0] < 8:
            y = F.linear(flat, product.csr)
        else:
            y = torch.sparse.mm(product.csr, flat.t()).t()
        if bias is not None:
            y = y + bias
        return y.reshape(*x.shape[:-1], weight.shape[0])
