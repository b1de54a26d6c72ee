"""Sees what a weight is multiplied with when no layer of its own is called: fused experts, attention projections.

Works below the Python functions, on the few multiplications that all of them end in (``mm``, ``bmm`` and relatives):
an operand that is a view into the weight's memory says by its offset which expert it is, and by its strides
which way round the matrix lies. So any eager implementation is understood, whatever it calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from resu.core.layers import Layer
from resu.pruning.token_rows import follow_rows, rows_between

__all__ = ["Multiplications", "Operand"]


@dataclass(frozen=True)
class Operand:
    """A weight whose multiplications are to be seen.

    Attributes:
        layer: The layer.
        parts: How many matrices with inputs of their own lie in it, one above the other.
        seen: ``seen(part, x)``, called with inputs ``[tokens, in]``.
    """

    layer: Layer
    parts: int
    seen: Callable[[int, Tensor], None]


class Multiplications(TorchDispatchMode):
    """Inside this context, operands are seen, and rows are followed through routing.

    Args:
        operands: Weights to watch.
        mask: ``[batch, tokens]`` of the present batch, where there is padding: the rows that a router picks remember
            which tokens they are.
    """

    def __init__(self, operands: Iterable[Operand], mask: Tensor | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mask = mask
        self._quiet = False
        self._by_memory: dict[int, list[Operand]] = {}
        for one in operands:
            self._by_memory.setdefault(_memory(one.layer.weight), []).append(one)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """What happens in here is not looked at."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._quiet:
            name = func.overloadpacket.__name__
            if self._by_memory and name in _PRODUCTS:
                self._look(name, [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)])
            if self.mask is not None and isinstance(out, (Tensor, list, tuple)):
                follow_rows(name, args, out, self.mask, _PRODUCTS[name][0] if name in _PRODUCTS else None)
        return out

    # -- products

    def _look(self, name: str, operands: list[Tensor]) -> None:
        skip, flip = _PRODUCTS[name]
        left, right = operands[skip], operands[skip + 1]
        if flip:  # linear(x, w): w is [out, in]
            right = right.transpose(-2, -1)
        if right.ndim == 1:
            right = right.unsqueeze(-1)
        offsets = operands[skip + 2] if name == "_grouped_mm" and len(operands) > skip + 2 else None
        for one in self._by_memory.get(_memory(right), ()):
            self._matched(one, left, right, offsets)
        for one in self._by_memory.get(_memory(left), ()):
            # W @ x is xᵀ @ Wᵀ.
            self._matched(one, right.transpose(-2, -1), left.transpose(-2, -1), None)

    def _matched(self, one: Operand, x: Tensor, matrix: Tensor, offsets: Tensor | None) -> None:
        """``x [… , rows, in] @ matrix [(batch,) in, out]``."""
        x = x.unsqueeze(0) if x.ndim == 1 else x
        if offsets is not None:  # rows are sorted by expert, offsets are where each one's end
            ends = offsets.tolist()
            for i, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
                for part in _covered(one, matrix[i]):
                    one.seen(part, rows_between(x, start, end))
            return
        if matrix.ndim == 2:
            for part in _covered(one, matrix):
                one.seen(part, x)
            return
        for i in range(matrix.shape[0]):
            for part in _covered(one, matrix[i]):
                one.seen(part, x[i])


# Name → (arguments before the two factors, whether the second is [out, in]).
_PRODUCTS = {
    "mm": (0, False),
    "bmm": (0, False),
    "mv": (0, False),
    "linear": (0, True),
    "addmm": (1, False),
    "addmv": (1, False),
    "baddbmm": (1, False),
    "_grouped_mm": (0, False),
}


def _memory(x: Tensor) -> int:
    return int(x.untyped_storage().data_ptr())


def _covered(one: Operand, matrix: Tensor) -> list[int]:
    """The parts whose first row is among the rows of ``matrix`` ``[in, out]``, a view into the weight.

    Looking at first rows only, gate and up projections that lie in one matrix count an input once, also where they
    are multiplied separately.
    """
    layer, weight = one.layer, one.layer.weight
    start = int(matrix.storage_offset()) - int(weight.storage_offset())
    if not 0 <= start < weight.numel() or matrix.dtype != weight.dtype or matrix.numel() == 0:
        return []
    if not weight.is_contiguous():
        raise ValueError(f"{layer.name!r} is not contiguous in memory; make it so, or exclude it")
    inputs_first = layer.stacked and layer.transposed
    columns = weight.shape[-2 if inputs_first else -1]
    rows = weight.numel() // columns  # of all parts together
    each = rows // one.parts
    inward, outward = matrix.stride()
    if inputs_first:
        expert, inside = divmod(start, columns * each)
        column, row = divmod(inside, each)
        row += expert * each
        right_way, step = inward == each, outward
    else:
        row, column = divmod(start, columns)
        right_way, step = inward == 1, outward // columns
    if matrix.shape[0] > 1 and not right_way:
        raise ValueError(_wrong_way(layer))
    if column or matrix.shape[0] != columns:
        raise ValueError(
            f"{layer.name!r} is multiplied in pieces of {matrix.shape[0]} of its {columns} inputs, which cannot be put "
            "together; exclude it or use a score without inputs"
        )
    step = max(step, 1)
    last = row + step * (matrix.shape[1] - 1)
    return [p for p in range(one.parts) if row <= p * each <= last and (p * each - row) % step == 0]


def _wrong_way(layer: Layer) -> str:
    shape = tuple(layer.weight.shape)
    if not layer.stacked:
        return f"{layer.name!r} {shape} is multiplied as [in, out], not as [out, in]; exclude it"
    now = "[experts, out, in]" if layer.transposed else "[experts, in, out]"
    return (
        f"{layer.name!r} {shape} is multiplied as {now}; say so by is_transposed = {not layer.transposed} on its "
        f"module ({type(layer.module).__name__}), or exclude it"
    )
