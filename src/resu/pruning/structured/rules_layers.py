"""Rules of operations that compute: products, convolutions, norms, pooling, reductions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resu.pruning.structured.flow import Operand, apart, meet, merge, multiply, only_along
from resu.pruning.structured.rules import elementwise, put, rule
from resu.pruning.structured.units import varying

if TYPE_CHECKING:
    from resu.pruning.structured.trace import Watcher

Labels = list[Tensor]


def _fixed(watcher: Watcher, labels: Labels, dims: Sequence[int], why: str) -> Labels:
    """Fix components along ``dims``; the others. Fixed ones may flow on: the reason then reaches whatever they meet."""
    inside, others = apart(watcher.units, labels, dims)
    for c in inside:
        watcher.units.fix(c, f"{why}, at {watcher.place}")
    return others


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
    _fixed(watcher, rest, range(x.ndim), "a convolution over it")
    outer, more = only_along(units, watcher.labels_of(weight), 0, what)
    inner, more_ = only_along(units, more, 1, what)
    _fixed(watcher, more_, range(weight.ndim), "the kernel of a convolution")
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
        watcher.note_size(groups, (tied or inputs or [torch.zeros(groups, dtype=torch.int64)])[0])
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
    _fixed(watcher, labels, dims, why)
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
    rest = _fixed(watcher, rest, range(1, x.ndim), "a norm's statistics go over it")
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
    rows = _fixed(watcher, labels, others, "weight norm divides by a norm over it")
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


# -- over space


def _spatial(count: int) -> Any:
    def follow(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        x = args[0]
        dims = tuple(range(x.ndim - count, x.ndim))
        labels = []
        for c in watcher.labels_of(x):
            over = tuple(d for d in varying(c) if d in dims)
            what = f"pooling or resizing over it at {watcher.place}"
            labels.append(watcher.units.tie(c, over, what) if over else c)
        outs = out if isinstance(out, (tuple, list)) else [out]
        for leaf in outs:
            put(watcher, leaf, labels)

    return follow


for _n in (1, 2, 3):
    for _name in (
        f"max_pool{_n}d_with_indices", f"avg_pool{_n}d", f"adaptive_avg_pool{_n}d", f"_adaptive_avg_pool{_n}d",
        f"adaptive_max_pool{_n}d", f"max_pool{_n}d", f"mkldnn_max_pool{_n}d",
        f"reflection_pad{_n}d", f"replication_pad{_n}d",
    ):  # fmt: skip
        rule(_name)(_spatial(_n))
for _name, _n in (
    ("upsample_nearest1d", 1), ("upsample_nearest2d", 2), ("upsample_nearest3d", 3), ("_upsample_nearest_exact1d", 1),
    ("_upsample_nearest_exact2d", 2), ("upsample_linear1d", 1), ("upsample_bilinear2d", 2), ("upsample_bicubic2d", 2),
    ("upsample_trilinear3d", 3), ("_upsample_bilinear2d_aa", 2),
):  # fmt: skip
    rule(_name)(_spatial(_n))


# -- reductions and what reads along a dimension


def _dims(value: Any, ndim: int) -> list[int]:
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return list(range(ndim))
    return [d % ndim for d in (value if isinstance(value, (list, tuple)) else [value])] if ndim else []


@rule(
    "mean", "sum", "amax", "amin", "var", "std", "max", "min", "argmax", "argmin", "logsumexp", "prod", "any", "all",
    "linalg_vector_norm", "norm", "var_mean", "std_mean", "median",
)  # fmt: skip
def _reduce(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    if len([a for a in args if isinstance(a, Tensor)]) > 1:  # max and min of two tensors are elementwise
        return elementwise(watcher, func.overloadpacket.__name__, [a for a in args if isinstance(a, Tensor)], out)
    x = args[0]
    names = [a.name for a in func._schema.arguments]
    bound = {**dict(zip(names, args, strict=False)), **kwargs}
    dims = _dims(bound.get("dim"), x.ndim)
    labels = _fixed(watcher, watcher.labels_of(x), dims, "it is reduced to one number")
    for leaf in out if isinstance(out, (tuple, list)) else [out]:
        if leaf.ndim == x.ndim:
            put(watcher, leaf, labels)
        elif leaf.ndim:
            put(watcher, leaf, [c.reshape([n for d, n in enumerate(c.shape) if d not in dims]) for c in labels])
    return None


@rule(
    "_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax", "cumsum", "cumprod", "sort", "flip", "roll",
    "logcumsumexp", "topk", "_fft_c2c",
)  # fmt: skip
def _along(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    x = args[0]
    names = [a.name for a in func._schema.arguments]
    bound = {**dict(zip(names, args, strict=False)), **kwargs}
    dims = _dims(bound.get("dim", bound.get("dims", -1)), x.ndim)
    labels = watcher.labels_of(x)
    others = _fixed(watcher, labels, dims, f"{func.overloadpacket.__name__} goes along it")
    for leaf in out if isinstance(out, (tuple, list)) else [out]:
        put(watcher, leaf, labels if leaf.shape == x.shape else others)


@rule("tril", "triu")
def _triangle(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    x = args[0]
    put(watcher, out, _fixed(watcher, watcher.labels_of(x), [x.ndim - 2, x.ndim - 1], "a triangle of it is taken"))


@rule("glu")
def _glu(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    x, dim = (*args, -1)[:2]
    dim %= x.ndim
    labels = []
    for c in watcher.labels_of(x):
        if dim in varying(c):
            c = watcher.units.tie(c.unflatten(dim, (2, -1)), (dim,), f"glu at {watcher.place}").squeeze(dim)
        labels.append(c)
    put(watcher, out, labels)
