"""Ctrl-C and SIGTERM, heard between two steps, where a checkpoint is exact."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch

from resu.experiments.train.placement import Placement

__all__ = ["Interrupted", "Interrupts"]

# Processes must stop after the same step, which takes a word between them; not at each step, for it costs time.
_ASK_EVERY = 8


class Interrupted(KeyboardInterrupt):
    """A run was stopped and has left a checkpoint."""


class Interrupts:
    """Remembers a first interrupt; a second one acts at once, as ever.

    As a context it listens; elsewhere than in the main thread, where Python allows no handlers, it hears nothing.
    """

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.heard = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard = True
        self._restore()

    def due(self, step: int) -> bool:
        """Whether to stop after ``step``; all processes get the same answer."""
        if self.placement.ranks.world == 1:
            return self.heard
        if step % _ASK_EVERY:
            return False
        return bool(self.placement.total(torch.tensor([float(self.heard)])).item())
