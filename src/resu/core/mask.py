"""``SparseMask``: which positions of one weight are kept, at one bit per weight."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_dynamo_compiling

from resu.core.bits import CHUNK, count_bits, pack_bits, rows_of, unpack_bits
from resu.core.counting import check_finite, keep_count, top_k_mask

__all__ = ["CHUNK", "SparseMask", "apply_all_", "count_bits", "pack_bits", "unpack_bits"]

# What is edited on the CPU as integers of its own size.
_WORD = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.int16, torch.uint16), torch.int16),
    **dict.fromkeys((torch.float32, torch.int32, torch.uint32), torch.int32),
    **dict.fromkeys((torch.float64, torch.int64, torch.uint64), torch.int64),
}
# Up to this many weights a mask that is laid on at every step remembers its bits unpacked, a byte per weight: to unpack
# them costs as much there as to use them.
_SMALL = 1 << 16


def _wordwise(x: Tensor) -> bool:
    """Whether ``x`` can be edited as integers of its own size on the CPU, by numpy, which is not compiled."""
    return x.dtype in _WORD and x.is_cpu and x.is_contiguous() and not is_dynamo_compiling()


def _ones(packed: np.ndarray[Any, Any], columns: int, active: bool) -> np.ndarray[Any, Any]:
    """int8 ``[rows, columns]`` with all bits set at active (or else pruned) positions."""
    bits = np.unpackbits(packed, -1, columns, "little").view(np.int8)
    return np.negative(bits, bits) if active else np.subtract(bits, 1, bits)


class SparseMask:
    """Which positions of one weight are kept (True = kept, active). A value object.

    Args:
        mask: Bool tensor of any shape, True = kept.

    Raises:
        TypeError: If ``mask`` is not a bool tensor. A mask is never guessed from values: a kept weight
            may be zero.

    Example:
        >>> m = SparseMask(torch.tensor([[True, False], [True, True]]))
        >>> m.sparsity, m.n_active, m.pruned_indices.tolist()
        (0.25, 3, [1])
    """

    __slots__ = ("_n_active", "_packed", "_shape", "_unpacked")

    def __init__(self, mask: Tensor) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = f"a {mask.dtype} tensor" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(
                f"SparseMask needs a bool tensor (True = kept), got {got}; convert explicitly, for example mask.bool()"
            )
        self._shape = torch.Size(mask.shape)
        self._packed = pack_bits(mask.detach())
        self._n_active = int(mask.sum())
        self._unpacked: np.ndarray[Any, Any] | None = None

    # -- constructors ---------------------------------------------------------------------------------
    @classmethod
    def from_packed(cls, packed: Tensor, shape: Sequence[int]) -> SparseMask:
        """Build from packed bits (uint8, the layout of :func:`pack_bits`) and the weight's shape.

        The bits are used as they are, not copied.

        Raises:
            ValueError: If the size does not fit, or padding bits are set (a sign of damage).
        """
        rows, columns = rows_of(shape)
        expected = (rows, -(-columns // 8))
        if packed.dtype != torch.uint8 or tuple(packed.shape) != expected:
            raise ValueError(
                f"packed mask has dtype {packed.dtype} and shape {tuple(packed.shape)}; a mask of shape "
                f"{tuple(shape)} needs torch.uint8 {expected}"
            )
        if columns % 8 and bool((packed[:, -1] >> (columns % 8)).any()):
            raise ValueError(f"packed mask of shape {tuple(shape)} has bits set in its padding: damaged data")
        self = cls.__new__(cls)
        self._shape = torch.Size(shape)
        self._packed = packed
        self._n_active = int(count_bits(packed).sum())
        self._unpacked = None
        return self

    @classmethod
    def from_magnitude(cls, weight: Tensor, sparsity: float) -> SparseMask:
        """Keep the largest ``|weight|`` over the whole tensor; exact count, ties keep the lower index."""
        check_finite(weight, "weight")
        return cls(top_k_mask(weight.detach().abs(), keep_count(weight.numel(), sparsity)))

    @classmethod
    def random(
        cls,
        shape: Sequence[int],
        sparsity: float,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> SparseMask:
        """Keep an exact number of positions chosen uniformly without replacement.

        The permutation is drawn on the generator's device (CPU by default), so that equal seeds give
        equal masks on every device.
        """
        n = math.prod(shape)
        where = generator.device if generator is not None else "cpu"
        kept = torch.randperm(n, generator=generator, device=where)[: keep_count(n, sparsity)]
        mask = torch.zeros(n, dtype=torch.bool, device=where)
        mask[kept] = True
        return cls(mask.view(tuple(shape)).to(device or where))

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> SparseMask:
        """Inverse of :meth:`state_dict`."""
        if set(state) != {"packed", "shape"}:
            raise ValueError(f"a mask state holds 'packed' and 'shape', got {sorted(state)}")
        return cls.from_packed(state["packed"], [int(d) for d in state["shape"]])

    # -- properties -----------------------------------------------------------------------------------
    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""
        return self._shape

    @property
    def numel(self) -> int:
        """Number of positions."""
        return self._shape.numel()

    @property
    def n_active(self) -> int:
        """Number of kept positions."""
        return self._n_active

    @property
    def n_pruned(self) -> int:
        """Number of pruned positions."""
        return self.numel - self._n_active

    @property
    def sparsity(self) -> float:
        """Fraction removed, ``n_pruned / numel`` (0 for an empty tensor)."""
        return self.n_pruned / self.numel if self.numel else 0.0

    @property
    def mask(self) -> Tensor:
        """Bool tensor of the weight's shape, True = kept; made on demand (1 byte per weight)."""
        return unpack_bits(self._packed, self._shape)

    @property
    def packed(self) -> Tensor:
        """The bits: uint8 ``[rows, ceil(columns / 8)]``, little bit order. Do not write to it."""
        return self._packed

    @property
    def active_indices(self) -> Tensor:
        """Flat int64 indices of kept positions, ascending."""
        return self.mask.view(-1).nonzero().view(-1)

    @property
    def pruned_indices(self) -> Tensor:
        """Flat int64 indices of pruned positions, ascending."""
        return self.mask.view(-1).logical_not_().nonzero().view(-1)

    @property
    def device(self) -> torch.device:
        """Where the bits live."""
        return self._packed.device

    @property
    def nbytes(self) -> int:
        """Bytes held: a bit per weight, and a byte more of a small mask that a training step lays on."""
        return self._packed.numel() + (0 if self._unpacked is None else self._unpacked.nbytes)

    # -- use ------------------------------------------------------------------------------------------
    def _check(self, x: Tensor) -> None:
        if x.shape != self._shape:
            raise ValueError(f"mask of shape {tuple(self._shape)} used on a tensor of shape {tuple(x.shape)}")

    def apply(self, x: Tensor) -> Tensor:
        """``x`` with +0.0 at pruned positions (not -0.0, and NaN does not survive); differentiable."""
        self._check(x)
        return torch.where(self.mask, x, torch.zeros((), dtype=x.dtype, device=x.device))

    def apply_(self, x: Tensor) -> Tensor:
        """Zero the pruned positions of ``x`` in place, without autograd; returns ``x``."""
        return self.zero_(x, active=False)

    def zero_(self, x: Tensor, *, active: bool) -> Tensor:
        """Set ``x`` to +0.0 at the active (or else the pruned) positions, in place, without autograd.

        On the CPU this is a bit-wise AND in row chunks: much faster than ``masked_fill_`` under a random
        mask, and without a mask of one byte per weight.
        """
        self._check(x)
        if not _wordwise(x):
            mask = self.mask
            # 8-bit floats as the bytes they are: torch fills few of their kinds.
            bytes_ = x.detach().view(torch.uint8) if x.element_size() == 1 else x.detach()
            bytes_.masked_fill_(mask if active else mask.logical_not_(), 0)
            return x
        words = self._words(x)
        for rows, ones in self._chunks(active=not active):
            part = words[rows]
            part &= ones
        increment_version(x)
        return x

    def restore_(self, x: Tensor, source: Tensor) -> Tensor:
        """Copy the active positions of ``source`` into ``x`` bit for bit, in place, without autograd."""
        self._check(x)
        if not (_wordwise(x) and _wordwise(source) and x.dtype == source.dtype):
            x.detach().copy_(torch.where(self.mask, source.detach(), x.detach()))
            return x
        words, former = self._words(x), self._words(source)
        for rows, ones in self._chunks(active=True):
            part = words[rows]
            part ^= (part ^ former[rows]) & ones
        increment_version(x)
        return x

    def take_pruned_(self, x: Tensor) -> Tensor:
        """Move the pruned positions out of ``x``: they are returned, with +0.0 elsewhere, and are +0.0 in ``x``.

        Example:
            >>> x = torch.tensor([1.0, 2.0])
            >>> SparseMask(torch.tensor([True, False])).take_pruned_(x), x
            (tensor([0., 2.]), tensor([1., 0.]))
        """
        self._check(x)
        if not _wordwise(x):
            taken = self.zero_(x.detach().clone(), active=True)
            self.zero_(x, active=False)
            return taken
        taken = torch.empty_like(x, requires_grad=False)
        words, out = self._words(x), self._words(taken)
        if self._shape.numel() <= _SMALL:  # at every step, as apply_all_
            words ^= np.bitwise_and(words, ~self._remembered(), out)
            increment_version(x)
            return taken
        bitwise_and: Any = torch.bitwise_and if self._by_torch() else np.bitwise_and
        for rows, ones in self._chunks(active=False):
            part = words[rows]
            part ^= bitwise_and(part, ones, out=out[rows])
        increment_version(x)
        return taken

    def _words(self, x: Tensor) -> Any:
        """``x`` as integers of its own size, ``[rows, columns]``, in the same memory."""
        words = x.detach().view(_WORD[x.dtype])
        if self._by_torch():
            return words.view(rows_of(self._shape))
        numbers = words.numpy()
        return numbers if numbers.ndim == 2 else numbers.reshape(rows_of(self._shape))

    def _chunks(self, *, active: bool) -> Iterator[tuple[slice, Any]]:
        """Row slices with an int8 ``[rows, columns]`` that has all bits set at active (or else pruned) positions."""
        n_rows, columns = rows_of(self._shape)
        step, packed, by_torch = max(1, CHUNK // max(columns, 1)), self._packed.numpy(), self._by_torch()
        for start in range(0, n_rows, step):
            rows = slice(start, min(start + step, n_rows))
            ones = _ones(packed[rows], columns, active)
            yield rows, torch.from_numpy(ones) if by_torch else ones

    def _remembered(self) -> np.ndarray[Any, Any]:
        """The bits of active positions as :func:`_ones` gives them; those of a small mask are kept."""
        if self._unpacked is not None:
            return self._unpacked
        ones = _ones(self._packed.numpy(), rows_of(self._shape)[1], active=True)
        if self._shape.numel() <= _SMALL:
            self._unpacked = ones
        return ones

    def _by_torch(self) -> bool:
        """Numpy starts faster, but torch shares the work where it is large and there are threads to share it."""
        return self._shape.numel() > CHUNK and torch.get_num_threads() > 2

    def get_active(self, x: Tensor) -> Tensor:
        """Values at kept positions, 1-D, row-major."""
        self._check(x)
        return x.masked_select(self.mask)

    def get_pruned(self, x: Tensor) -> Tensor:
        """Values at pruned positions, 1-D, row-major."""
        self._check(x)
        return x.masked_select(self.mask.logical_not_())

    def to(self, device: torch.device | str) -> SparseMask:
        """The same mask on another device."""
        other = SparseMask.__new__(SparseMask)
        other._shape, other._n_active = self._shape, self._n_active
        other._packed, other._unpacked = self._packed.to(device), None
        return other

    def state_dict(self) -> dict[str, Tensor]:
        """``packed`` (uint8 bits) and ``shape`` (int64): plain tensors, safe for any file format."""
        return {"packed": self._packed, "shape": torch.tensor(self._shape, dtype=torch.int64)}

    def checksum(self) -> str:
        """SHA-256 (hex) over shape and bits; equal masks have equal checksums on every machine."""
        digest = hashlib.sha256(repr(tuple(self._shape)).encode())
        digest.update(self._packed.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return SparseMask.from_packed, (self._packed, self._shape)

    def __or__(self, other: SparseMask) -> SparseMask:
        """Positions active in either mask."""
        if self._shape != other._shape:
            raise ValueError(f"masks of shapes {tuple(self._shape)} and {tuple(other._shape)} cannot be joined")
        return SparseMask.from_packed(self._packed | other._packed, self._shape)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparseMask):
            return NotImplemented
        return self._shape == other._shape and torch.equal(self._packed, other._packed.to(self.device))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"SparseMask(shape={tuple(self._shape)}, n_active={self._n_active}, sparsity={self.sparsity:.4f})"


def apply_all_(pairs: Iterable[tuple[SparseMask, Tensor]]) -> None:
    """``mask.apply_(x)`` for each pair ``(mask, x)``.

    A training step does little else twice for each layer, and for a small one the calls cost more than the work. So
    this makes as few as there can be.
    """
    done = []
    known = {} if is_dynamo_compiling() else _WORD  # as _wordwise
    for mask, x in pairs:
        shape, word = mask._shape, known.get(x.dtype)
        if word is None or not x.is_cpu or not x.is_contiguous() or x.shape != shape or shape.numel() > CHUNK:
            mask.apply_(x)
            continue
        words = x.detach().view(word).numpy()
        if words.ndim != 2:
            words = words.reshape(rows_of(shape))
        ones = mask._unpacked
        np.bitwise_and(words, mask._remembered() if ones is None else ones, words)
        done.append(x)
    increment_version(done)
