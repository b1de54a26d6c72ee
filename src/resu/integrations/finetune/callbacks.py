"""What watches a run: progress, the log, interrupts, memory, and losses that are no numbers."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from resu.core.interrupts import Interrupted, Listener
from resu.core.io import replacing
from resu.core.peak_memory import MemoryUse, measure_memory
from resu.modules.memory import MemoryReport, memory_report
from resu.training.wrappers import plain_optimizer

__all__ = ["Interrupted", "Interrupts", "LogFile", "MemoryWatch", "ShownProgress"]


class Interrupts(TrainerCallback):
    """Ctrl-C and SIGTERM: a checkpoint after the present step, then an end. It listens as a context."""

    def __init__(self) -> None:
        self.listener = Listener()
        self.stopped_at: int | None = None

    def __enter__(self) -> Interrupts:
        self.listener.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.listener.__exit__(*error)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop here if asked to."""

        def anyone(heard: bool) -> bool:
            told = torch.tensor(float(heard), device=args.device)
            torch.distributed.all_reduce(told)
            return bool(told)

        if state.global_step < state.max_steps and self.listener.due(
            state.global_step, None if args.world_size == 1 else anyone
        ):
            control.should_save = control.should_training_stop = True
            self.stopped_at = state.global_step


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
