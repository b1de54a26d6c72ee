"""What becomes of each weight of a checkpoint in the layout ``pack-quantized``, and by how much it changes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from resu.formats.pack_quantized import (
    DTYPES,
    FORMAT,
    check_group_size,
    pack_quantized,
    quantization_config,
    quantized_parts,
    unpack_quantized,
)
from resu.formats.relayout import Plan

__all__ = ["QuantizedPlan", "plan_quantized"]


@dataclass
class QuantizedPlan(Plan):
    """A :class:`resu.formats.relayout.Plan` whose packed weights become 4-bit codes and scales.

    Attributes:
        group_size: Columns that share a scale; None: all of a row.
        ignore: Modules that a reader would take for quantized if it were not told.
        errors: ``{name: relative error}``, filled while weights are written: ``‖w − ŵ‖ / ‖w‖``.
    """

    group_size: int | None = None
    ignore: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)

    def parts(self, name: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The tensors a weight becomes."""
        if name not in self.packed:
            return super().parts(name)
        found = quantized_parts(self.stored.dtype(name), tuple(self.stored.shape(name)), self.group_size)
        return {name.removesuffix("weight") + part: what for part, what in found.items()}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The values of :meth:`parts`, read and checked."""
        if name not in self.packed:
            return super().tensors(name)
        weight = self.dense(name)
        try:
            parts = pack_quantized(weight, self.group_size)
        except ValueError as error:
            raise ValueError(f"{name!r} cannot be stored as {FORMAT}: {error}") from None
        norm = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
        change = float(torch.linalg.vector_norm(unpack_quantized(parts).sub_(weight), dtype=torch.float64))
        self.errors[name] = change / norm if norm else 0.0
        return {name.removesuffix("weight") + part: value for part, value in parts.items()}

    def config(self) -> dict[str, Any]:
        """``config.json`` of the result."""
        return {**self.plain_config(), "quantization_config": quantization_config(self.ignore, self.group_size)}


def plan_quantized(plan: Plan, names: Iterable[str], ignore: Iterable[str], group_size: int | None) -> QuantizedPlan:
    """The plan to store weights as 4-bit codes.

    Args:
        plan: Of the dense layout, which says what is stored and which masks belong to it.
        names: The weights to pack: of linear layers, ``[out, in]``.
        ignore: Linear modules that stay dense.
        group_size: As in :func:`resu.formats.pack_quantized.pack_quantized`.

    Raises:
        ValueError: If there is nothing to pack, a weight has a dtype or a number of columns that does not fit, or the
            model is quantized already.
    """
    chosen, stored = list(names), plan.stored
    if not chosen:
        raise ValueError(f"there is no weight to store as {FORMAT}: no linear layer is left, or all are ignored")
    odd = []
    for name in chosen:
        dtype, columns = stored.dtype(name), stored.shape(name)[1]
        try:
            check_group_size(group_size, columns)
        except ValueError as error:
            odd.append(f"{name} ({error})")
        if dtype not in DTYPES:
            odd.append(f"{name} ({dtype})")
    if odd:
        shown = "; ".join(odd[:3]) + ("; …" if len(odd) > 3 else "")
        raise ValueError(f"{len(odd)} of {len(chosen)} weights cannot be stored as {FORMAT}: {shown}")
    if held := plan.plain_config().get("quantization_config"):
        raise ValueError(f"the model is quantized already ({held.get('quant_method')}); make it dense first")
    return QuantizedPlan(stored, FORMAT, plan.masks, plan.metadata, chosen, group_size, list(ignore))
