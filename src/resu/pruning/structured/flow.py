"""How labels flow through operations that combine tensors: elementwise ones, products, reshapes.

The labels of a tensor are *components*: int64 tensors of the tensor's number of dimensions, each of size 1 along the
dimensions it does not differ in. A weight ``[out, in]`` has two, ``[out, 1]`` and ``[1, in]``; an activation
``[batch, channels, height, width]`` usually has one, ``[1, channels, 1, 1]``.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import mul

import torch
from torch import Tensor

from resu.pruning.structured.units import Units, varying

__all__ = ["Operand", "apart", "merge", "multiply", "rearrange", "reshape"]

Components = list[Tensor]


@dataclass(frozen=True)
class Operand:
    """A tensor as the rules see it.

    Attributes:
        shape: Its shape; 1 where it only seems to have more (expanded).
        labels: Its components.
    """

    shape: tuple[int, ...]
    labels: Components

    @staticmethod
    def of(tensor: Tensor, labels: Components) -> Operand:
        sizes = [1 if stride == 0 else n for n, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        return Operand(tuple(sizes), labels)

    def padded(self, ndim: int) -> Operand:
        """With leading dimensions of size 1, as broadcasting adds them."""
        more = ndim - len(self.shape)
        return Operand((1,) * more + self.shape, [c.reshape((1,) * more + tuple(c.shape)) for c in self.labels])


def _clean(units: Units, labels: Components) -> Components:
    return [c for c in map(units.compact, labels) if c is not None]


def merge(units: Units, operands: Sequence[Operand], what: str) -> Components:
    """Components of an elementwise result: where two operands have labels along a dimension, they are united.

    An operand without labels along a dimension that it has, is a constant of that size, and fixes what it meets.
    """
    ndim = max(len(o.shape) for o in operands)
    operands = [o.padded(ndim) for o in operands]
    merged: Components = []
    for operand in operands:
        for component in operand.labels:
            dims = set(varying(component))
            meet = [m for m in merged if dims & set(varying(m))]
            for m in meet:
                units.unite(component, m, what)
            merged = [m for m in merged if all(m is not x for x in meet)]
            shape = torch.broadcast_shapes(component.shape, *(m.shape for m in meet))
            merged.append(units.roots(component.expand(shape)))
    for m in merged:
        for operand in operands:
            has = {d for d in varying(m) if operand.shape[d] > 1}
            labelled = {d for c in operand.labels for d in varying(c)}
            if has - labelled:
                units.fix(m, f"{what} with a tensor of a size of its own")
    return _clean(units, merged)


def apart(units: Units, labels: Components, dims: Sequence[int]) -> tuple[Components, Components]:
    """Components that differ along ``dims``, and the others."""
    inside = [c for c in labels if set(varying(c)) & set(dims)]
    return inside, [c for c in labels if all(c is not x for x in inside)]


def only_along(units: Units, labels: Components, dim: int, what: str) -> tuple[Components, Components]:
    """Components along ``dim`` as vectors, tied over whatever else they differ in; and the others."""
    inside, others = apart(units, labels, [dim])
    vectors = []
    for c in inside:
        rest = tuple(d for d in varying(c) if d != dim)
        vectors.append((units.tie(c, rest, what) if rest else c).reshape(-1))
    return vectors, others


def meet(units: Units, left: Components, right: Components, what: str) -> None:
    """Unite vectors of two sides index by index; where one side has none, the other is fixed."""
    for a in left:
        for b in right:
            units.unite(a, b, what)
    for mine, theirs in ((left, right), (right, left)):
        if not theirs:
            for c in mine:
                units.fix(c, f"{what} with a tensor of a size of its own")


def multiply(units: Units, a: Operand, b: Operand, what: str) -> Components:
    """Components of ``a @ b``, both ``[m, k] @ [k, n]`` or both ``[batch, m, k] @ [batch, k, n]``."""
    last, before = len(a.shape) - 1, len(a.shape) - 2
    left, a_rest = only_along(units, a.labels, last, what)
    right, b_rest = only_along(units, b.labels, before, what)
    if a.shape[last] > 1 or b.shape[before] > 1:
        meet(units, left, right, what)
    return merge(units, [Operand((*a.shape[:-1], 1), a_rest), Operand((*b.shape[:-2], 1, b.shape[-1]), b_rest)], what)


def rearrange(units: Units, shape: Sequence[int], labels: Components, move: Callable[[Tensor], Tensor]) -> Components:
    """Components after an operation that only moves elements: the operation, done to the labels."""
    return _clean(units, [move(c.expand(tuple(shape)).contiguous()) for c in labels])


def reshape(
    units: Units,
    old: Sequence[int],
    new: Sequence[int],
    labels: Components,
    choose: Callable[[list[int], list[int]], int],
    what: str,
) -> Components:
    """Components after a reshape.

    A dimension that is taken apart (``heads · size`` → ``heads, size``) can lose indices of one part only, or what is
    left is no box: units are tied over the others.

    Args:
        units: The units.
        old: The shape before.
        new: The shape after.
        labels: Components before.
        choose: ``choose(sizes of the parts, new dimension each lies in)``: the part that may lose indices.
        what: The name of the operation.
    """
    if math.prod(old) == 0:
        return []
    old_dims, new_dims = [d for d, n in enumerate(old) if n > 1], [d for d, n in enumerate(new) if n > 1]
    sizes, where = refined([old[d] for d in old_dims], [new[d] for d in new_dims])
    if sizes is None:
        for c in labels:
            units.fix(c, f"{what} from {tuple(old)} to {tuple(new)}, whose sizes do not nest")
        return []
    mine = _parts([old[d] for d in old_dims], sizes)
    result = []
    for c in labels:
        shape = [sizes[k] if c.shape[d] > 1 else 1 for d, parts in zip(old_dims, mine, strict=True) for k in parts]
        c = c.reshape(shape)
        for parts in mine:
            differ = [k for k in parts if k in varying(c)]
            c = units.roots(c)
            differ = [k for k in differ if not bool((c == c.narrow(k, 0, 1)).all())]
            if len(differ) > 1:
                free = differ[choose([sizes[k] for k in differ], [new_dims[where[k]] for k in differ])]
                c = units.tie(c, tuple(k for k in differ if k != free), what)
        # Whole along the new dimensions that it differs in, and of size 1 along the others: not as large as the tensor.
        whole = {where[k] for k in varying(c)}
        c = c.expand([n if where[k] in whole else 1 for k, n in enumerate(sizes)])
        result.append(c.reshape([n if d in {new_dims[w] for w in whole} else 1 for d, n in enumerate(new)]))
    return _clean(units, result)


def refined(old: Sequence[int], new: Sequence[int]) -> tuple[list[int] | None, list[int]]:
    """The common parts of two shapes of equally many elements, without sizes of 1; and the new dimension each lies in.

    None where the two do not nest (6 = 2·3 seen as 3·2).

    Example:
        >>> refined([5, 12], [5, 3, 4]), refined([4, 6], [8, 3]), refined([2, 3], [3, 2])
        (([5, 3, 4], [0, 1, 2]), ([4, 2, 3], [0, 0, 1]), (None, []))
    """
    ends = sorted({*accumulate(old, mul), *accumulate(new, mul)})
    if any(b % a for a, b in pairwise(ends)):
        return None, []
    sizes = [b // a for a, b in pairwise([1, *ends])]
    new_ends = list(accumulate(new, mul))
    return sizes, [bisect_left(new_ends, end) for end in ends]


def _parts(dims: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Which of the common parts each dimension is made of."""
    ends, places = list(accumulate(dims, mul)), list(accumulate(sizes, mul))
    where = [bisect_left(ends, end) for end in places]
    return [[k for k, d in enumerate(where) if d == dim] for dim in range(len(dims))]
