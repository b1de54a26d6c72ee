"""What a sparse model weighs: bytes in each layout, counted as the layout stores them.

``1 / (1 - sparsity)`` is nobody's compression: positions have to be stored too, and what a user would store
instead is bf16 or int4, not float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resu.core.mask import SparseMask
from resu.core.pattern import NM

__all__ = ["LAYOUTS", "CompressionStats", "LayerBytes", "layout_bytes"]

LAYOUTS = ("dense", "bf16", "bitmask", "csr", "2:4", "int4", "int4+bitmask")


def layout_bytes(mask: Tensor | SparseMask, dtype: torch.dtype = torch.float32) -> dict[str, int | None]:
    """Bytes of one masked weight in each layout; tensors only, without the few hundred bytes of a file's header.

    With R rows (the first dimension), C columns (the rest), k kept, d dimensions and b bytes per value:

    - ``dense``: ``R·C·b``, zeros stored. ``bf16``: ``2·R·C``, the dense rounding a user would compare with.
    - ``bitmask``: ``k·b + R·ceil(C/8) + 8·R + 8·d`` (values, bits, row offsets, shape): the layout of
      ``resu.formats.bitmask``.
    - ``csr``: ``k·b + 4·k + 4·(R + 1)`` (values, int32 columns, int32 row starts).
    - ``2:4``: ``R·C/2·b + R·ceil(C/8) + 8·d`` (``sparse-24-bitmask``); None unless every four columns of a matrix keep
      exactly two.
    - ``int4``: ``4·R·ceil(C/8) + b·R + 8·d``: dense 4-bit codes in int32 words, one scale per row, shape
      (``pack-quantized``).
    - ``int4+bitmask``: ``ceil(k/2) + R·ceil(C/8) + 8·R``: 4-bit codes of kept values, bits, float32 scale and zero
      point per row (what a layer in QRESU mode holds beside θ; float64 scales for a float64 weight).

    Args:
        mask: Bool or SparseMask, True = kept.
        dtype: Of the values.

    Returns:
        ``{layout: bytes}``, None where the layout cannot hold the mask.

    Example:
        >>> sizes = layout_bytes(torch.tensor([[True, False, False, True]] * 2))
        >>> sizes["dense"], sizes["bitmask"], sizes["csr"], sizes["2:4"]
        (32, 50, 44, 34)
    """
    packed = mask if isinstance(mask, SparseMask) else SparseMask(mask)
    rows, bit_bytes = packed.packed.shape
    n, kept, value = packed.numel, packed.n_active, dtype.itemsize
    columns = n // rows if rows else 0
    bits, shape = rows * bit_bytes, 8 * len(packed.shape)
    scale = 8 if dtype == torch.float64 else 4
    paired = len(packed.shape) == 2 and columns % 4 == 0 and 2 * kept == n and NM(2, 4).violations(packed.mask) == 0
    return {
        "dense": n * value,
        "bf16": 2 * n,
        "bitmask": kept * value + bits + 8 * rows + shape,
        "csr": kept * (value + 4) + 4 * (rows + 1),
        "2:4": n // 2 * value + bits + shape if paired else None,
        "int4": 4 * rows * -(-columns // 8) + value * rows + shape,
        "int4+bitmask": (kept + 1) // 2 + bits + 2 * scale * rows,
    }


@dataclass(frozen=True)
class LayerBytes:
    """One pruned weight: what is kept, and its bytes in each layout (None: the layout cannot hold it)."""

    name: str
    shape: tuple[int, ...]
    kept: int
    numel: int
    dtype: str
    bytes: Mapping[str, int | None]

    @property
    def sparsity(self) -> float:
        """Fraction removed."""
        return 1 - self.kept / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class CompressionStats:
    """Kept weights and bytes in each layout, per layer and in total; ``print`` it for a table.

    Attributes:
        layers: The pruned weights.
        rest: Bytes of the model's other parameters and buffers, which every layout stores as they are.
        rest_numel: How many values those are.
    """

    layers: tuple[LayerBytes, ...]
    rest: int = 0
    rest_numel: int = 0

    @classmethod
    def of(
        cls,
        masks: Mapping[str, Tensor | SparseMask],
        model: nn.Module | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> CompressionStats:
        """Count.

        Args:
            masks: ``{parameter name: mask}``.
            model: Gives each weight's dtype and the parameters and buffers that are not pruned; None: masks alone.
            dtype: Of the values, where there is no model.

        Raises:
            ValueError: If a name is no parameter of the model, or a mask does not fit.

        Example:
            >>> model = nn.Linear(64, 64)
            >>> stats = CompressionStats.of({"weight": torch.rand(64, 64) < 0.25}, model)
            >>> stats.bytes("dense"), stats.total("dense"), stats.ratio("bitmask") < 4
            (16384, 16640, True)
        """
        known = {} if model is None else dict(model.named_parameters(remove_duplicate=False))
        layers = []
        for name, given in masks.items():
            if model is not None and name not in known:
                raise ValueError(f"the model has no parameter {name!r}; it has: {', '.join(known)}")
            mask = given if isinstance(given, SparseMask) else SparseMask(given)
            if model is not None and known[name].shape != mask.shape:
                raise ValueError(
                    f"mask {name!r} has shape {tuple(mask.shape)}, the parameter {tuple(known[name].shape)}"
                )
            kind = known[name].dtype if model is not None else dtype
            layers.append(
                LayerBytes(
                    name=name,
                    shape=tuple(mask.shape),
                    kept=mask.n_active,
                    numel=mask.numel,
                    dtype=str(kind).removeprefix("torch."),
                    bytes=layout_bytes(mask, kind),
                )
            )
        pruned = {id(known[name]) for name in masks} if model is not None else set()
        others = [] if model is None else [x for x in _once(model) if id(x) not in pruned]
        return cls(tuple(layers), sum(x.nbytes for x in others), sum(x.numel() for x in others))

    @property
    def numel(self) -> int:
        """Positions of the pruned weights."""
        return sum(layer.numel for layer in self.layers)

    @property
    def kept(self) -> int:
        """Kept positions of the pruned weights."""
        return sum(layer.kept for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction removed of the pruned weights."""
        return 1 - self.kept / self.numel if self.numel else 0.0

    @property
    def model_sparsity(self) -> float:
        """Fraction removed of all parameters and buffers."""
        whole = self.numel + self.rest_numel
        return (self.numel - self.kept) / whole if whole else 0.0

    def bytes(self, layout: str) -> int | None:
        """Bytes of the pruned weights in a layout; None if it cannot hold one of them.

        Raises:
            ValueError: On an unknown layout; the known ones are listed.
        """
        if layout not in LAYOUTS:
            raise ValueError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
        total = 0
        for layer in self.layers:
            size = layer.bytes[layout]
            if size is None:
                return None
            total += size
        return total

    def total(self, layout: str) -> int | None:
        """Bytes of the whole model with its pruned weights in that layout and the rest as it is."""
        size = self.bytes(layout)
        return None if size is None else size + self.rest

    def ratio(self, layout: str, against: str = "dense") -> float | None:
        """How many times smaller the whole model is than with weights in layout ``against``; below 1 it is larger."""
        size, other = self.total(layout), self.total(against)
        return None if size is None or other is None else other / max(size, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "numel": self.numel,
            "kept": self.kept,
            "sparsity": self.sparsity,
            "model_sparsity": self.model_sparsity,
            "rest_bytes": self.rest,
            "bytes": {layout: self.bytes(layout) for layout in LAYOUTS},
            "total_bytes": {layout: self.total(layout) for layout in LAYOUTS},
            "layers": [
                {
                    "name": layer.name,
                    "shape": list(layer.shape),
                    "dtype": layer.dtype,
                    "kept": layer.kept,
                    "numel": layer.numel,
                    "sparsity": layer.sparsity,
                    "bytes": dict(layer.bytes),
                }
                for layer in self.layers
            ],
        }

    def __str__(self) -> str:
        head = ["layer", "kept", "of", "sparsity", *LAYOUTS]
        rows = [
            [x.name, f"{x.kept}", f"{x.numel}", f"{x.sparsity:.4f}", *(_human(x.bytes[k]) for k in LAYOUTS)]
            for x in self.layers
        ]
        sums = [self.bytes(k) for k in LAYOUTS]
        ends = [["pruned weights", f"{self.kept}", f"{self.numel}", f"{self.sparsity:.4f}", *map(_human, sums)]]
        if self.rest_numel:
            rest = [
                "everything else",
                f"{self.rest_numel}",
                f"{self.rest_numel}",
                "",
                *[_human(self.rest)] * len(LAYOUTS),
            ]
            totals = [_human(self.total(k)) for k in LAYOUTS]
            whole, kept = self.numel + self.rest_numel, self.kept + self.rest_numel
            ends += [rest, ["whole model", f"{kept}", f"{whole}", f"{self.model_sparsity:.4f}", *totals]]
        ratios = [self.ratio(k) for k in LAYOUTS]
        ends.append(["times smaller", "", "", "", *("–" if r is None else f"{r:.2f}" for r in ratios)])
        return "\n".join(table(head, rows, ends))


def table(head: Sequence[str], *parts: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table: the first column to the left, the others to the right, parts between rules."""
    everything = [head, *(row for part in parts for row in part)]
    widths = [max(len(row[i]) for row in everything) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = (c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(cells).rstrip()

    yield line(head)
    for part in parts:
        if part:
            yield "-" * (sum(widths) + 2 * (len(widths) - 1))
            yield from map(line, part)


def _human(size: int | None) -> str:
    if size is None:
        return "–"
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def _once(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, each tensor once."""
    seen: set[int] = set()
    for x in [*model.parameters(), *model.buffers()]:
        if id(x) not in seen:
            seen.add(id(x))
            yield x
