"""Ctrl-C and SIGTERM, heard between two steps, where a checkpoint is exact."""

from __future__ import annotations

import signal
import threading
import time
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
    """Remembers a first interrupt; a second one, a second later or more, acts at once.

    (A launcher passes on what the terminal has sent already, so one Ctrl-C may be heard twice.)

    As a context it listens; elsewhere than in the main thread, where Python allows no handlers, it hears nothing.
    """

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self._heard_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._heard_at is None:
            self._heard_at = time.monotonic()
        elif time.monotonic() - self._heard_at > 1.0:
            raise KeyboardInterrupt

    def due(self, step: int) -> bool:
        """Whether to stop after ``step``; all processes get the same answer."""
        if self.placement.ranks.world == 1:
            return self._heard_at is not None
        if step % _ASK_EVERY:
            return False
        return bool(self.placement.total(torch.tensor([float(self._heard_at is not None)])).item())
