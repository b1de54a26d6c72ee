"""Rules of operations that go over dimensions: pooling, resizing, reductions, softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from resu.pruning.structured.rules import elementwise, fixed_along, put, rule
from resu.pruning.structured.units import varying

if TYPE_CHECKING:
    from resu.pruning.structured.trace import Watcher

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


@rule("grid_sampler_2d", "grid_sampler_3d", "cudnn_grid_sampler")
def _grid_sample(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    watcher.fix([args[1]], f"it says where to look, at {watcher.place}")
    _spatial(args[0].ndim - 2)(watcher, func, args[:1], {}, out)


@rule("im2col")
def _patches(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """``[batch, channels, height, width]`` → ``[batch, channels · window, places]``: a channel's window is one unit."""
    x = args[0]
    others = fixed_along(watcher, watcher.labels_of(x), [0, 2, 3], "windows of it are taken")
    window = out.shape[-2] // x.shape[-3]
    put(watcher, out, [c.flatten(2).repeat_interleave(window, 1) for c in others])


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
    labels = fixed_along(watcher, watcher.labels_of(x), dims, "it is reduced to one number")
    for leaf in out if isinstance(out, (tuple, list)) else [out]:
        if leaf.ndim == x.ndim:
            put(watcher, leaf, labels)
        elif leaf.ndim:
            put(watcher, leaf, [c.reshape([n for d, n in enumerate(c.shape) if d not in dims]) for c in labels])
    return None


@rule(
    "_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax", "cumsum", "cumprod", "sort", "flip", "roll",
    "logcumsumexp", "topk", "_fft_c2c", "_fft_r2c", "_fft_c2r",
)  # fmt: skip
def _along(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    x = args[0]
    names = [a.name for a in func._schema.arguments]
    bound = {**dict(zip(names, args, strict=False)), **kwargs}
    dims = _dims(bound.get("dim", bound.get("dims", -1)), x.ndim)
    labels = watcher.labels_of(x)
    others = fixed_along(watcher, labels, dims, f"{func.overloadpacket.__name__} goes along it")
    for leaf in out if isinstance(out, (tuple, list)) else [out]:
        put(watcher, leaf, labels if leaf.shape == x.shape else others)


@rule("tril", "triu")
def _triangle(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    x = args[0]
    put(watcher, out, fixed_along(watcher, watcher.labels_of(x), [x.ndim - 2, x.ndim - 1], "a triangle of it is taken"))


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
