"""Ctrl-C and SIGTERM, heard between two steps, where a checkpoint is exact."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

__all__ = ["Interrupted", "Listener"]

# Processes must stop after the same step, which takes a word between them; not at each step, for it costs time.
_ASK_EVERY = 8


class Interrupted(KeyboardInterrupt):
    """A run was stopped and has left a checkpoint."""


class Listener:
    """Remembers a first interrupt; a second one, a second later or more, acts at once.

    (A launcher passes on what the terminal has sent already, so one Ctrl-C may be heard twice.)

    As a context it listens; elsewhere than in the main thread, where Python allows no handlers, it hears nothing.

    Example:
        >>> import os
        >>> with Listener() as listener:
        ...     os.kill(os.getpid(), signal.SIGTERM)
        ...     time.sleep(0.01)
        ...     listener.due(1)
        True
    """

    def __init__(self) -> None:
        self._heard_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
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

    def due(self, step: int, anyone: Callable[[bool], bool] | None = None) -> bool:
        """Whether to stop after ``step``.

        Args:
            step: Steps done.
            anyone: Where several processes train together: from whether this one heard something to whether any did.
        """
        heard = self._heard_at is not None
        if anyone is None:
            return heard
        return step % _ASK_EVERY == 0 and anyone(heard)
