"""Interrupts of a run that may have several processes."""

from __future__ import annotations

import torch

from resu.core.interrupts import Interrupted, Listener
from resu.experiments.train.placement import Placement

__all__ = ["Interrupted", "Interrupts"]


class Interrupts(Listener):
    """Hears interrupts for all processes of a run."""

    def __init__(self, placement: Placement) -> None:
        super().__init__()
        self.placement = placement

    def stops(self, step: int) -> bool:
        """Whether to stop after ``step``; all processes get the same answer."""
        return self.due(step, None if self.placement.ranks.world == 1 else self._anyone)

    def _anyone(self, heard: bool) -> bool:
        return bool(self.placement.total(torch.tensor([float(heard)])).item())
