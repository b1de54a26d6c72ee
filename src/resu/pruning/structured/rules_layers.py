"""Rules of operations with weights: products, convolutions, norms, tables, recurrences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resu.pruning.structured.flow import Operand, apart, meet, merge, multiply, only_along
from resu.pruning.structured.rules import fixed_along, put, rule

if TYPE_CHECKING:
    from resu.pruning.structured.trace import Watcher

Labels = list[Tensor]


# -- products


def _product(watcher: Watcher, a: Tensor, b: Tensor, what: str) -> Operand:
    left, right = watcher.operand(a), watcher.operand(b)
    labels = multiply(watcher.units, left, right, f"{what} at {watcher.place}")
    return Operand((*left.shape[:-1], right.shape[-1]), labels)


@rule("mm", "bmm")
def _mm(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    put(watcher, out, _product(watcher, args[0], args[1], "product").labels)


@rule("addmm", "baddbmm")
def _addmm(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    product = _product(watcher, args[1], args[2], "product")
    put(watcher, out, merge(watcher.units, [watcher.operand(args[0]), product], f"bias at {watcher.place}"))


@rule("mv", "addmv")
def _mv(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    matrix, vector = args[-2:]
    column = Operand((vector.shape[0], 1), [c.unsqueeze(-1) for c in watcher.labels_of(vector)])
    left = watcher.operand(matrix)
    labels = multiply(watcher.units, left, column, f"product at {watcher.place}")
    product = Operand(left.shape[:1], [c.squeeze(-1) for c in labels])
    bias = [watcher.operand(args[0])] if len(args) == 3 else []
    put(watcher, out, merge(watcher.units, [*bias, product], f"bias at {watcher.place}"))


# -- convolutions


@rule("convolution", "mkldnn_convolution")
def _convolution(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    x, weight, bias, *_, transposed, _, groups = args[:9]
    units, what = watcher.units, f"convolution at {watcher.place}"
    inputs, rest = only_along(units, watcher.labels_of(x), 1, what)
    fixed_along(watcher, rest, range(x.ndim), "a convolution over it")
    outer, more = only_along(units, watcher.labels_of(weight), 0, what)
    inner, more_ = only_along(units, more, 1, what)
    fixed_along(watcher, more_, range(weight.ndim), "the kernel of a convolution")
    if transposed:
        outer, inner = inner, outer  # [in, out / groups, …]
    # Now outer: labels of outputs (per group where transposed), inner: of inputs (per group where not).
    if groups > 1:
        outer, inner, inputs = _grouped(watcher, x, weight, out, outer, inner, inputs, groups, transposed)
    if x.shape[1] > 1:
        meet(units, inputs, inner, what)
    labels = [c.reshape([-1 if d == 1 else 1 for d in range(out.ndim)]) for c in outer]
    operands = [Operand(tuple(out.shape[d] if d == 1 else 1 for d in range(out.ndim)), labels)]
    if isinstance(bias, Tensor):
        operands.append(_along_channels(watcher, bias, out.ndim))
    put(watcher, out, merge(units, operands, what))


def _grouped(
    watcher: Watcher,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    outer: Labels,
    inner: Labels,
    inputs: Labels,
    groups: int,
    transposed: bool,
) -> tuple[Labels, Labels, Labels]:
    """Inputs and outputs of a grouped convolution as vectors over all channels.

    Where a group has one input, groups go as a whole. Else each group loses the same of its channels, so that all stay
    equally large: those of other groups are tied to the first's.
    """
    units, what = watcher.units, f"groups of a convolution at {watcher.place}"
    channels_in, channels_out = x.shape[1], out.shape[1]
    if channels_in == groups:
        over_in = inner if transposed else []
        over_out = [c.repeat(groups) for c in outer] if transposed and channels_out > groups else outer
        if transposed and channels_out == groups:
            over_out = over_in  # weight [in, 1]: its first dimension is both
        if transposed and channels_out > groups:
            for c in over_in + outer:
                units.fix(c, f"{what}, several outputs for each input")
            return [], [], []
        tied = [units.tie(c.view(groups, -1), (1,), what).view(-1) for c in over_out]
        watcher.note_size(groups, (tied or inputs or [torch.zeros(groups, dtype=torch.int64, device="cpu")])[0])
        for c in tied:
            for i in inputs:
                units.unite(c, i, what)
        if not inputs:
            for c in tied:
                units.fix(c, f"{what} over a tensor of a size of its own")
        return [units.roots(c.repeat_interleave(channels_out // groups)) for c in tied], inputs, inputs
    inputs = [units.tie(c.view(groups, -1), (0,), what).view(-1) for c in inputs]
    if transposed:
        inner = [units.tie(c.view(groups, -1), (0,), what).view(-1) for c in inner]
        return [c.repeat(groups) for c in outer], inner, inputs
    outer = [units.tie(c.view(groups, -1), (0,), what).view(-1).repeat(groups) for c in outer]
    return outer, inner, inputs


def _along_channels(watcher: Watcher, vector: Tensor, ndim: int) -> Operand:
    """A vector per channel as an operand beside ``[batch, channels, …]``."""
    shape = (1, vector.shape[0], *(1,) * (ndim - 2))
    return Operand(shape, [c.reshape([-1 if d == 1 else 1 for d in range(ndim)]) for c in watcher.labels_of(vector)])


# -- norms


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_no_update",
    "cudnn_batch_norm",
    "miopen_batch_norm",
)
def _batch_norm(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    x, *vectors = [a for a in args if isinstance(a, Tensor)]
    operands = [watcher.operand(x), *(_along_channels(watcher, v, x.ndim) for v in vectors)]
    put(watcher, out[0], merge(watcher.units, operands, f"batch norm at {watcher.place}"))


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def _layer_norm(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    x, shape, *affine = args
    dims = range(x.ndim - len(shape), x.ndim)
    why = "a norm's statistics go over it"
    labels = watcher.labels_of(x)
    fixed_along(watcher, labels, dims, why)
    for vector in affine:
        if isinstance(vector, Tensor):
            watcher.fix([vector], f"{why}, at {watcher.place}")
    put(watcher, out if isinstance(out, Tensor) else out[0], labels)


@rule("native_group_norm")
def _group_norm(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    x, weight, bias, _, channels, _, groups = args[:7]
    units, what = watcher.units, f"group norm at {watcher.place}"
    operands = [watcher.operand(x)]
    operands += [_along_channels(watcher, v, x.ndim) for v in (weight, bias) if isinstance(v, Tensor)]
    labels = merge(units, operands, what)
    vectors, rest = only_along(units, labels, 1, what)
    rest = fixed_along(watcher, rest, range(1, x.ndim), "a norm's statistics go over it")
    by_group = [units.tie(c.view(groups, -1), (1,), what).reshape(-1) for c in vectors]
    vectors = [c.repeat_interleave(channels // groups) for c in by_group]
    for c, v in zip(by_group, vectors, strict=True):
        watcher.note_size(groups, c)
        watcher.note_count(nn.GroupNorm, "num_groups", c)
        watcher.note_count(nn.GroupNorm, "num_channels", v)
    put(watcher, out[0], [c.reshape([-1 if d == 1 else 1 for d in range(x.ndim)]) for c in vectors] + rest)


@rule("_weight_norm_interface")
def _weight_norm(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    v, g, dim = (*args, 0)[:3]
    others = [d for d in range(v.ndim) if d != dim]
    labels = watcher.labels_of(v)
    rows = fixed_along(watcher, labels, others, "weight norm divides by a norm over it")
    columns = [c for c in labels if all(c is not r for r in rows)]
    lengths = Operand(tuple(n if d == dim else 1 for d, n in enumerate(v.shape)), rows)
    merged = merge(watcher.units, [lengths, watcher.operand(g)], f"weight norm at {watcher.place}")
    put(watcher, out[0], merged + columns)


# -- tables and recurrences


@rule("embedding")
def _embedding(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    weight, indices = args[:2]
    watcher.fix([indices], f"it indexes a table, at {watcher.place}")
    rows, columns = apart(watcher.units, watcher.labels_of(weight), [0])
    for c in rows:
        watcher.units.fix(c, f"rows of a table are looked up, at {watcher.place}")
    put(watcher, out, [c.reshape([1] * (out.ndim - 1) + [-1]) for c in columns])


@rule("_embedding_bag", "_embedding_bag_forward_only")
def _embedding_bag(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    weight, *others = args
    watcher.fix([x for x in others if isinstance(x, Tensor)], f"it says what to look up, at {watcher.place}")
    put(watcher, out[0], fixed_along(watcher, watcher.labels_of(weight), [0], "rows of a table are looked up"))


@rule("mkldnn_rnn_layer", "lstm", "gru")
def _rnn(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    x, weight, *rest = args
    tensors = [a for a in rest if isinstance(a, Tensor)]
    what = f"the inputs of a recurrent layer at {watcher.place}"
    if isinstance(weight, Tensor) and weight.ndim == 2:
        inputs, others = only_along(watcher.units, watcher.labels_of(x), x.ndim - 1, what)
        columns, rows = only_along(watcher.units, watcher.labels_of(weight), 1, what)
        if x.shape[-1] > 1:
            meet(watcher.units, inputs, columns, what)
        for c in others + rows:
            watcher.units.fix(c, f"units of a recurrent layer, at {watcher.place}")
    else:
        tensors += [a for a in (x, weight) if isinstance(a, Tensor)]
    watcher.fix(tensors, f"units of a recurrent layer, at {watcher.place}")
