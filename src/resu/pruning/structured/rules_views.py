"""Rules of operations that move elements: views, splits, concatenation, indexing, padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resu.pruning.structured.flow import Operand, apart, merge, reshape
from resu.pruning.structured.rules import fixed_along, put, rule
from resu.pruning.structured.units import varying

if TYPE_CHECKING:
    from resu.pruning.structured.trace import Watcher


@rule("view", "_unsafe_view", "_reshape_alias")
def _reshape(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    x = args[0]
    if not isinstance(args[1], (list, tuple)):  # view(dtype)
        watcher.fix([x], f"its bytes are read as another type, at {watcher.place}")
        return
    free = [d for d, n in enumerate(args[1]) if n == -1]
    counts = _counts(watcher.owner)

    def choose(sizes: list[int], dims: list[int]) -> int:
        """The part that may lose indices: the one left open by -1, a count of heads, or the first that is no 2 or 3."""
        for k, d in enumerate(dims):
            if d in free:
                return k
        for k, n in enumerate(sizes):
            if n in counts and counts[n] == "heads":
                return k
        if len(sizes) == 2 and sizes[0] in counts:  # channel shuffle: groups stay
            return 1
        return next((k for k, n in enumerate(sizes) if n > 3), len(sizes) - 1)

    what = f"reshape at {watcher.place}"
    labels = reshape(watcher.units, x.shape, out.shape, watcher.labels_of(x), choose, what)
    for c in labels:
        for d in varying(c):
            watcher.note_size(out.shape[d], _slab(watcher, c, d))
    watcher.put(out, labels)


def _slab(watcher: Watcher, labels: Tensor, dim: int) -> Tensor:
    """Labels along ``dim`` at the first index of the other dimensions."""
    for d in range(labels.ndim):
        if d != dim:
            labels = labels.narrow(d, 0, 1)
    return labels.reshape(-1)


def _counts(module: nn.Module | None) -> dict[int, str]:
    """Counts that a module's attributes name: ``{8: "heads"}`` of ``self.num_heads = 8``."""
    result: dict[int, str] = {}
    for name, value in vars(module).items() if module is not None else ():
        if isinstance(value, int) and not isinstance(value, bool) and value > 1:
            lowered = name.lower()
            if "head" in lowered and "dim" not in lowered and "size" not in lowered:
                result[value] = "heads"
            elif "group" in lowered:
                result.setdefault(value, "groups")
    return result


@rule(
    "t", "transpose", "permute", "unsqueeze", "squeeze", "pixel_unshuffle", "repeat", "view_as_real", "view_as_complex"
)  # fmt: skip
def _move(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    name = func.overloadpacket.__name__
    if name.startswith("view_as"):
        last = args[0].ndim - 1 if name == "view_as_complex" else args[0].ndim
        inside, rest = apart(watcher.units, watcher.labels_of(args[0]), [last])
        for c in inside:
            watcher.units.fix(c, f"read as complex numbers, at {watcher.place}")
        put(watcher, out, [c.squeeze(last) if name == "view_as_complex" else c.unsqueeze(-1) for c in rest])
        return
    if name in ("t", "transpose", "permute", "unsqueeze"):  # the same for labels of size 1: none as large as the tensor
        watcher.put(out, [func(c, *args[1:], **kwargs) for c in watcher.labels_of(args[0])])
        return
    watcher.put(out, watcher.moved(args[0], func, *args[1:], **kwargs))


@rule("expand")
def _expand(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    labels = watcher.labels_of(args[0])
    put(watcher, out, labels)
    for c in labels:
        for d in varying(c):
            watcher.note_size(c.shape[d], _slab(watcher, c, d))


@rule("pixel_shuffle", "channel_shuffle", "native_channel_shuffle")
def _shuffle(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Channels that become the pixels of one go together; and what groups swap, all groups lose alike."""
    x, count = args[:2]
    dim = x.ndim - 3 if func.overloadpacket.__name__ == "pixel_shuffle" else 1
    parts, over = ((-1, count * count), 1) if func.overloadpacket.__name__ == "pixel_shuffle" else ((count, -1), 0)
    for c in apart(watcher.units, watcher.labels_of(x), [dim])[0]:
        watcher.units.tie(c.unflatten(dim, parts), (dim + over,), f"{func.overloadpacket.__name__} at {watcher.place}")
    watcher.put(out, watcher.moved(x, func, count))


@rule("select", "unbind")
def _select(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    x, dim = args[0], (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % args[0].ndim
    inside, rest = apart(watcher.units, watcher.labels_of(x), [dim])
    for c in inside:
        watcher.units.fix(c, f"single indices of it are picked, at {watcher.place}")
    for leaf in out if isinstance(out, (tuple, list)) else [out]:
        watcher.put(leaf, [c.squeeze(dim) for c in rest])


@rule("split", "unsafe_split", "split_with_sizes", "unsafe_split_with_sizes", "chunk", "unsafe_chunk")
def _split(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Sequence[Tensor]) -> None:
    x = args[0]
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % x.ndim
    sizes = [part.shape[dim] for part in out]
    inside, rest = apart(watcher.units, watcher.labels_of(x), [dim])
    if len(set(sizes)) == 1 and len(sizes) > 1:
        inside = [_parts_alike(watcher, c, dim, len(sizes), "split") for c in inside]
    elif len(sizes) > 1 and isinstance(args[1], int):  # a chunk in parts of 3, 3 and 2: what is left falls otherwise
        for c in inside:
            watcher.units.fix(c, f"it is split in parts of unequal size, at {watcher.place}")
    start = 0
    for part, size in zip(out, sizes, strict=True):
        mine = [c.narrow(dim, start, size) for c in inside]
        for c in mine:
            watcher.note_size(size, _slab(watcher, c, dim))
        watcher.put(part, mine + rest)
        start += size


def _parts_alike(watcher: Watcher, labels: Tensor, dim: int, parts: int, what: str) -> Tensor:
    """Each part loses the same indices, so that they stay equally large."""
    apart_ = labels.unflatten(dim, (parts, -1))
    tied = watcher.units.tie(apart_, (dim,), f"{what} at {watcher.place}")
    return tied.expand(apart_.shape).flatten(dim, dim + 1)


@rule("slice")
def _slice(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    names = ("self", "dim", "start", "end", "step")
    bound = {"dim": 0, "start": None, "end": None, "step": 1, **dict(zip(names, args, strict=False)), **kwargs}
    x = args[0]
    dim, step, n, size = bound["dim"] % x.ndim, bound["step"], x.shape[bound["dim"]], out.shape[bound["dim"]]
    inside, rest = apart(watcher.units, watcher.labels_of(x), [dim])
    if size == n and step == 1:
        watcher.put(out, inside + rest)
        return
    start = bound["start"] or 0
    start = min(max(start + n if start < 0 else start, 0), n)
    kept = []
    for c in inside:
        if step == 1 and size and n % size == 0 and start % size == 0:
            c = _parts_alike(watcher, c, dim, n // size, "slice")
            watcher.note_size(size, _slab(watcher, c.narrow(dim, start, size), dim))
        elif step > 1 and n % step == 0 and size == n // step:
            pairs = c.unflatten(dim, (-1, step))
            tied = watcher.units.tie(pairs, (dim + 1,), f"slice at {watcher.place}")
            c = tied.expand(pairs.shape).flatten(dim, dim + 1)
        else:
            watcher.units.fix(c, f"a part of it is cut out, at {watcher.place}")
            continue
        kept.append(c.narrow(dim, start, n - start)[(slice(None),) * dim + (slice(0, (size - 1) * step + 1, step),)])
    watcher.put(out, kept + rest)


@rule("cat")
def _cat(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    tensors = [x for x in args[0] if x.numel() or x.ndim == out.ndim]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    units, what = watcher.units, f"concatenation at {watcher.place}"
    along, across = [], []
    for x in tensors:
        inside, rest = apart(units, watcher.labels_of(x), [dim])
        mine = torch.zeros([x.shape[d] if d == dim else 1 for d in range(out.ndim)], dtype=torch.int64, device="cpu")
        for c in inside:
            others = tuple(d for d in varying(c) if d != dim)
            c = units.tie(c, others, what) if others else c
            if bool((mine == 0).all()):
                mine = c
            else:
                units.unite(mine, c, what)
        along.append(mine)
        operand = Operand.of(x, rest)
        across.append(Operand(tuple(1 if d == dim else n for d, n in enumerate(operand.shape)), rest))
    labels = merge(units, across, what)
    joined = torch.cat(along, dim)
    if bool((joined != 0).any()):
        labels.append(joined)
    watcher.put(out, labels)


@rule("stack")
def _stack(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    operands = [watcher.operand(x) for x in args[0]]
    labels = merge(watcher.units, operands, f"stack at {watcher.place}")
    watcher.put(out, [c.unsqueeze(dim) for c in labels])


@rule("index", "index_select")
def _index(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    x = args[0]
    by = [i for i in (args[1] if isinstance(args[1], (list, tuple)) else args[2:]) if i is not None]
    watcher.fix(by, f"it indexes another tensor, at {watcher.place}")
    if func.overloadpacket.__name__ == "index_select":
        dims = [args[1] % x.ndim]
    else:
        if any(i is not None and i.dtype == torch.bool for i in args[1]):
            watcher.fix([x], f"it is indexed by a mask, at {watcher.place}")
            return
        dims = [d for d, i in enumerate(args[1]) if i is not None]
    inside, rest = apart(watcher.units, watcher.labels_of(x), dims)
    for c in inside:
        watcher.units.fix(c, f"it is indexed, at {watcher.place}")
    full = [c.expand(x.shape).contiguous().to(x.device) for c in rest]
    moved = [watcher.units.compact(func(c, *args[1:], **kwargs).cpu()) for c in full]
    watcher.put(out, [c for c in moved if c is not None])


@rule("gather")
def _gather(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Along other dimensions than its own the index has to be as long as what is left, so to be expanded to it."""
    x, dim, index = args[0], args[1] % args[0].ndim, args[2]
    watcher.fix([index], f"it indexes another tensor, at {watcher.place}")
    read = [d for d in range(x.ndim) if d == dim or index.shape[d] != x.shape[d]]
    others = fixed_along(watcher, watcher.labels_of(x), read, "it is indexed")
    operands = [Operand.of(x, others), Operand.of(index, [])]
    watcher.put(out, merge(watcher.units, operands, f"gather at {watcher.place}"))


@rule("constant_pad_nd")
def _pad(watcher: Watcher, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Values of padding belong to no unit; within a channel they belong to the channel."""
    x, pads = args[0], list(args[1])
    labels = []
    for c in watcher.labels_of(x):
        own = [0] * len(pads)
        for k in range(len(pads) // 2):
            d = x.ndim - 1 - k
            if d in varying(c):
                own[2 * k : 2 * k + 2] = pads[2 * k : 2 * k + 2]
        labels.append(torch.constant_pad_nd(c, own, 0))
    watcher.put(out, labels)
