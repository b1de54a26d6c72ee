"""Where the bytes are: measured from the tensors of a model, and predicted for layers that do not exist yet.

Both give a :class:`MemoryReport`. :func:`memory_report` adds up what tensors hold now; :func:`predict_memory`
computes the same figures from shapes, sparsity and mode, by the formulas in its docstring.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resu.core.counting import keep_count
from resu.core.mask import SparseMask
from resu.core.quantization import SCHEMES, check_bits
from resu.core.sharding import is_sharded, local, part_of
from resu.modules.base import RESUModule
from resu.modules.convert import get_resu_modules
from resu.modules.settings import RESUMode

__all__ = ["KINDS", "LayerMemory", "MemoryReport", "memory_report", "predict_memory"]

KINDS = ("active", "codes", "scales", "mask", "theta", "gradients", "optimizer", "cache", "other")
_REST = "(everything else)"


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one layer by kind.

    ``active``: dense weight values (zeros of a SPARSE layer too, they take room). ``codes``: packed active
    values. ``scales``: scales, zero points and row offsets. ``mask``: bits. ``theta``: values at pruned
    positions (inside the weight in RESU mode). ``optimizer``: optimizer state, and the averages of selective
    updates. ``cache``: a CSR copy for inference. ``other``: biases and captured norms.
    """

    name: str
    mode: str
    numel: int
    sparsity: float
    bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self.bytes.values())


@dataclass(frozen=True)
class MemoryReport:
    """Bytes by layer and kind; ``print`` it for a table."""

    layers: tuple[LayerMemory, ...]

    @property
    def by_kind(self) -> dict[str, int]:
        """Bytes per kind, all kinds present."""
        return {kind: sum(layer.bytes.get(kind, 0) for layer in self.layers) for kind in KINDS}

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(layer.total for layer in self.layers)

    @property
    def numel(self) -> int:
        """Weights in all (those of the listed layers)."""
        return sum(layer.numel for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "total": self.total,
            "by_kind": self.by_kind,
            "layers": [
                {"name": x.name, "mode": x.mode, "numel": x.numel, "sparsity": x.sparsity, **x.bytes}
                for x in self.layers
            ],
        }

    def __str__(self) -> str:
        kinds = [kind for kind, size in self.by_kind.items() if size]
        head = ["layer", "mode", "sparsity", *kinds, "total", "B/weight"]
        rows = [head]
        for x in self.layers:
            shown = ["" if x.name == _REST else f"{x.sparsity:.4f}"]
            sizes = [_human(x.bytes.get(kind, 0)) for kind in kinds]
            each = f"{x.total / x.numel:.3f}" if x.numel else ""
            rows.append([x.name, x.mode, *shown, *sizes, _human(x.total), each])
        sums = [_human(size) for kind, size in self.by_kind.items() if size]
        each = f"{self.total / self.numel:.3f}" if self.numel else ""
        rows.append(["total", "", "", *sums, _human(self.total), each])
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]

        def line(row: Sequence[str]) -> str:
            cells = (c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            return "  ".join(cells).rstrip()

        rule = "-" * len(line(head))
        return "\n".join([line(head), rule, *map(line, rows[1:-1]), rule, line(rows[-1])])


def _human(size: int) -> str:
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def _size(x: Any) -> int:
    """Bytes here: of a sharded tensor those of its local part."""
    return local(x).nbytes if isinstance(x, Tensor) else 0


def _state(optimizer: Optimizer | None, parameter: Tensor) -> int:
    if optimizer is None:
        return 0
    state = optimizer.state.get(parameter, {})
    values = [v for value in state.values() for v in (value if isinstance(value, (list, tuple)) else [value])]
    return sum(_size(value) for value in values)


def _layer(name: str, layer: RESUModule, optimizer: Optimizer | None, seen: set[int]) -> LayerMemory:
    size = dict.fromkeys(KINDS, 0)
    mask = layer.mask
    if not layer.mode.quantized and id(layer.weight) not in seen:
        weight = layer.weight
        if layer.mode is RESUMode.RESU:
            assert mask is not None
            here = SparseMask(part_of(mask.mask, weight)) if is_sharded(weight) else mask
            size["theta"] = here.n_pruned * weight.element_size()
        size["active"] = _size(weight) - size["theta"]
    else:
        size["theta"] = _size(layer.theta)
    size["codes"] = _size(layer.codes)
    size["scales"] = _size(layer.scale) + _size(layer.zero) + _size(layer._offsets)
    size["mask"] = _size(layer.bitmask)
    size["optimizer"] = _size(layer.theta_m) + _size(layer.theta_v)
    size["other"] = _size(layer._square_sums)
    if layer._product is not None:
        size["cache"] = layer._product.nbytes
    own = [*layer._parameters.values(), *layer._waiting]
    for parameter in own:
        if parameter is None or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        size["gradients"] += _size(parameter.grad)
        size["optimizer"] += _state(optimizer, parameter)
        if parameter is layer.bias:
            size["other"] += _size(parameter)
    return LayerMemory(name or "(model)", layer.mode.name, layer.weight_shape.numel(), layer.sparsity, size)


def memory_report(model: nn.Module, optimizer: Optimizer | None = None) -> MemoryReport:
    """Bytes that the tensors of ``model`` and ``optimizer`` hold in this process now, by layer and kind.

    Resurrection layers are listed one by one, everything else in one row. Each tensor counts once. What
    exists only during a step (activations, a tile of weights) is not in it.

    Args:
        model: Any module.
        optimizer: Its state is counted too.

    Example:
        >>> from resu import RESULinear
        >>> layer = RESULinear(64, 32, bias=False)
        >>> layer.prune_by_magnitude(0.5)
        >>> layer.enter_qresu_mode(bits=4)
        >>> report = memory_report(layer)
        >>> report.by_kind["codes"], report.by_kind["mask"], report.by_kind["theta"]
        (512, 256, 4096)
    """
    seen: set[int] = set()
    modules = get_resu_modules(model)
    layers = [_layer(name, layer, optimizer, seen) for name, layer in modules.items()]
    rest = dict.fromkeys(KINDS, 0)
    for parameter in model.parameters():
        if id(parameter) not in seen:
            seen.add(id(parameter))
            rest["other"] += _size(parameter)
            rest["gradients"] += _size(parameter.grad)
            rest["optimizer"] += _state(optimizer, parameter)
    known = {id(b) for layer in modules.values() for b in layer._buffers.values()}
    rest["other"] += sum(_size(buffer) for buffer in model.buffers() if id(buffer) not in known)
    if optimizer is not None:
        strangers = [p for p in optimizer.state if id(p) not in seen]
        rest["optimizer"] += sum(_state(optimizer, p) for p in strangers)
    if any(rest.values()):
        layers.append(LayerMemory(_REST, "", 0, 0.0, rest))
    return MemoryReport(tuple(layers))


# Bytes of optimizer state per trained value: (count, bytes each; None = the value's own dtype), and per
# parameter.
_OPTIMIZERS: dict[str, tuple[int, int | None, int]] = {
    "none": (0, None, 0),
    "sgd": (0, None, 0),
    "momentum": (1, None, 0),
    "adam": (2, None, 4),
    "adamw": (2, None, 4),
    "adam8bit": (2, 1, 4),
}


def predict_memory(
    shapes: Iterable[tuple[str, Sequence[int]]],
    mode: RESUMode | str,
    sparsity: float,
    *,
    bits: int = 4,
    qscheme: str = SCHEMES[0],
    dtype: torch.dtype = torch.float32,
    theta_dtype: torch.dtype | None = None,
    optimizer: str = "adam",
    gradients: bool = True,
) -> MemoryReport:
    """Bytes that training layers of these shapes in ``mode`` will hold (weights only, no biases).

    With n weights of which a are active and p pruned, e bytes each, t bytes per value of θ, b bits, r rows of
    c columns::

        DENSE            n·e                                      trains n
        SPARSE, RESU     n·e + r·⌈c/8⌉                            trains n
        QRESU            ⌈a·b/8⌉ + r·⌈c/8⌉ + 8·r + 4·(r+1) + p·t   trains p (8 per tensor instead of 8·r)
        QRESU_SELECTIVE  the same + 8·p for its averages           trains itself

    plus a gradient and the optimizer's state for each trained value.

    Args:
        shapes: ``(name, shape)`` per layer.
        mode: A ``RESUMode`` or its name ("qresu").
        sparsity: In [0, 1); each layer prunes ``floor(n · sparsity)``.
        bits: 4 or 8.
        qscheme: ``"per_channel"`` or ``"per_tensor"``.
        dtype: Of the weight.
        theta_dtype: Of θ in the quantized modes; ``dtype`` by default.
        optimizer: ``"none"``, ``"sgd"``, ``"momentum"``, ``"adam"``, ``"adamw"`` or ``"adam8bit"``.
        gradients: Whether gradients are held (between backward and ``zero_grad``).

    Raises:
        ValueError: On an unknown mode, optimizer, scheme or bits, or a sparsity out of range.

    Example:
        >>> report = predict_memory([("fc", (4096, 4096))], "qresu", 0.5)
        >>> round(report.by_kind["codes"] / 4096**2, 3), round(report.total / 4096**2, 2)
        (0.25, 8.38)
    """
    if isinstance(mode, str):
        known = {m.value: m for m in RESUMode}
        if mode.lower() not in known:
            raise ValueError(f"unknown mode {mode!r}; known: {', '.join(known)}")
        mode = known[mode.lower()]
    if optimizer not in _OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}; known: {', '.join(_OPTIMIZERS)}")
    check_bits(bits, qscheme)
    count, each, once = _OPTIMIZERS[optimizer]
    trained_dtype = (theta_dtype or dtype) if mode.quantized else dtype
    layers = []
    for name, shape in shapes:
        n, rows = math.prod(shape), shape[0] if len(shape) > 1 else 1
        active = n if mode is RESUMode.DENSE else keep_count(n, sparsity)
        size = dict.fromkeys(KINDS, 0)
        if mode is not RESUMode.DENSE:
            size["mask"] = rows * -(-(n // rows) // 8)
        if mode.quantized:
            size["codes"] = -(-active * bits // 8)
            exact = 8 if dtype == torch.float64 else 4
            size["scales"] = 2 * exact * (rows if qscheme == SCHEMES[0] else 1) + (4 if active < 2**31 else 8) * (
                rows + 1
            )
            size["theta"] = (n - active) * trained_dtype.itemsize
        else:
            size["theta"] = (n - active) * dtype.itemsize if mode is RESUMode.RESU else 0
            size["active"] = n * dtype.itemsize - size["theta"]
        trained = n - active if mode.quantized else n
        if mode is RESUMode.QRESU_SELECTIVE:
            size["optimizer"] = 2 * trained * (8 if trained_dtype == torch.float64 else 4)
        else:
            size["gradients"] = trained * trained_dtype.itemsize if gradients else 0
            size["optimizer"] = trained * count * (each or trained_dtype.itemsize) + once
        layers.append(LayerMemory(name, mode.name, n, (n - active) / n if n else 0.0, size))
    return MemoryReport(tuple(layers))
