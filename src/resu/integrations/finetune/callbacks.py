"""What watches a run: progress, the log, interrupts, memory, and losses that are no numbers."""

from __future__ import annotations

import csv
import io
import math
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from resu.core.io import replacing
from resu.core.peak_memory import MemoryUse, measure_memory
from resu.modules.memory import MemoryReport, memory_report
from resu.training.wrappers import plain_optimizer

__all__ = ["Interrupted", "Interrupts", "LogFile", "MemoryWatch", "ShownProgress"]

# Processes must stop after the same step, which takes a word between them; not at each step, for it costs time.
_ASK_EVERY = 8


class Interrupted(KeyboardInterrupt):
    """A run was stopped and has left a checkpoint."""


class Interrupts(TrainerCallback):
    """Ctrl-C and SIGTERM: a checkpoint after the present step, then an end. A second one, a second later, acts at once.

    As a context it listens; elsewhere than in the main thread, where Python allows no handlers, it hears nothing.
    """

    def __init__(self) -> None:
        self._heard_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}
        self.stopped_at: int | None = None

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

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop here if asked to."""
        if state.global_step < state.max_steps and self._due(args, state.global_step):
            control.should_save = control.should_training_stop = True
            self.stopped_at = state.global_step

    def _due(self, args: Any, step: int) -> bool:
        if args.world_size == 1:
            return self._heard_at is not None
        if step % _ASK_EVERY:
            return False
        heard = torch.tensor(float(self._heard_at is not None), device=args.device)
        torch.distributed.all_reduce(heard)
        return bool(heard)


class ShownProgress(TrainerCallback):
    """Tells ``(step, steps, what)`` after each step."""

    def __init__(self, tell: Callable[[int, int, str], None]) -> None:
        self.tell = tell
        self.loss = ""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Take up the loss."""
        if logs and "loss" in logs:
            self.loss = f" loss {float(logs['loss']):.4g}"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell it."""
        self.tell(state.global_step, state.max_steps, f"training{self.loss}")


class LogFile(TrainerCallback):
    """``log.csv``: what the trainer logged, a row for each step that has something. It is whole at any time, and a run
    that goes on has the rows of before.

    Raises:
        FloatingPointError: When a logged loss is no finite number.
    """

    COLUMNS = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_accuracy", "eval_perplexity")

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write the file again; it has a hundred rows, not a million."""
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            raise FloatingPointError(
                f"the loss is {float(loss)} at step {state.global_step}: the step size is too large, or the weights "
                "overflow; try a smaller learning rate"
            )
        if not args.should_save:
            return
        rows: dict[int, dict[str, Any]] = {}
        for entry in state.log_history:
            row = rows.setdefault(entry["step"], {})
            row.update({name: entry[name] for name in self.COLUMNS if name in entry})
        text = io.StringIO()
        writer = csv.DictWriter(text, self.COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
        with replacing(self.path, overwrite=True) as temporary:
            temporary.write_text(text.getvalue(), encoding="utf-8")


class MemoryWatch(TrainerCallback):
    """Measures one step: what model and optimizer hold before it, and the most that it needs beside.

    It is the second step after the start, when the optimizer has its state.
    """

    def __init__(self) -> None:
        self.held: MemoryReport | None = None
        self.used: MemoryUse | None = None
        self._open = ExitStack()
        self._at: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose the step."""
        self._at = state.global_step + 1

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin, if it is the one."""
        if state.global_step == self._at and args.device.type in ("cpu", "cuda"):
            self.held = memory_report(kwargs["model"], plain_optimizer(kwargs["optimizer"]))
            self.used = self._open.enter_context(measure_memory(args.device))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End."""
        self._open.close()

    def close(self) -> None:
        """End, whatever has happened."""
        self._open.close()

    def report(self) -> dict[str, Any] | None:
        """Bytes: ``state`` (what model and optimizer hold), ``kinds`` of it, ``step`` (the most beside it in a step),
        ``peak`` (both); None if no step was measured.
        """
        if self.held is None or self.used is None:
            return None
        kinds = {kind: size for kind, size in self.held.by_kind.items() if size}
        total = self.held.total
        return {"state": total, "kinds": kinds, "step": self.used.peak, "peak": total + self.used.peak}
