"""What a structured pruning did: sizes before and after, what was refused and why, and the way back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from resu.pruning.structured.removal import Removal, Slices
from resu.pruning.structured.target import Reached

__all__ = ["StructuredResult"]


@dataclass
class StructuredResult:
    """The outcome of :meth:`resu.pruning.structured.pruner.StructuredPruner.prune`.

    Attributes:
        units: ``{group name: (units before, units after)}`` of what was removed from.
        refused: ``{group name: reason}``: what was tried on a copy and did not give the masked model.
        fixed: ``{layer name: reason}``: outputs that cannot be removed.
        reached: What the target came to.
        error: Largest difference between the smaller model and the masked one over the largest output, in float64.
        parameters: Before and after.
        macs: Multiply-adds of a pass over the example inputs, before and after.
        slices: ``{tensor name: {dimension: indices kept}}``.
        attributes: ``{module name: {attribute: value}}`` that were repaired.
    """

    units: dict[str, tuple[int, int]]
    refused: dict[str, str]
    fixed: dict[str, str]
    reached: Reached
    error: float
    parameters: tuple[int, int]
    macs: tuple[int, int]
    slices: Slices = field(repr=False)
    attributes: dict[str, dict[str, Any]]
    _removal: Removal = field(repr=False)

    def undo(self) -> None:
        """Put model and optimizer back as they were, bit for bit.

        Raises:
            RuntimeError: If something else was removed since, which is to be undone first.
        """
        self._removal.undo()

    def forget(self) -> None:
        """Let go of the tensors kept for :meth:`undo`."""
        self._removal.forget()

    def report(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "target": self.reached.target,
            "asked": self.reached.asked,
            "reached": self.reached.reached,
            "met": self.reached.met,
            "error": self.error,
            "parameters": list(self.parameters),
            "macs": list(self.macs),
            "units": {name: list(pair) for name, pair in self.units.items()},
            "refused": dict(self.refused),
            "fixed": dict(self.fixed),
        }

    def __str__(self) -> str:
        rows = [f"{'group':<40} {'before':>8} {'after':>8}"]
        rows += [f"{name:<40} {before:>8} {after:>8}" for name, (before, after) in self.units.items()]
        for what, (before, after) in (("parameters", self.parameters), ("multiply-adds", self.macs)):
            rows.append(f"{what:<40} {before:>8} {after:>8}  ({before / max(after, 1):.2f}x fewer)")
        rows += [f"refused {name}: {why}" for name, why in self.refused.items()]
        return "\n".join(rows)
