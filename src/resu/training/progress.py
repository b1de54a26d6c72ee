"""A progress bar for training runs, shown on a terminal where rich is installed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resu.training.cycle import RESUTrainer

__all__ = ["Progress"]


class Progress:
    """Context manager; ``update(loss)`` after each step shows loss, sparsity and phase."""

    def __init__(self, trainer: RESUTrainer, enabled: bool = True) -> None:
        self.trainer = trainer
        self._bar: Any = None
        self._task: Any = None
        if enabled and sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
                from rich.progress import Progress as Bar
            except ImportError:  # rich is an extra; training does not need it
                return
            columns = (
                TextColumn("cycle {task.fields[cycle]}/{task.fields[cycles]} {task.fields[phase]:<9}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.4f}  sparsity {task.fields[sparsity]:.3f}"),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=Console(stderr=True))

    def _fields(self, loss: float) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "cycle": min(len(trainer.history) + 1, trainer.config.cycles),
            "cycles": trainer.config.cycles,
            "phase": trainer.phase,
            "loss": loss,
            "sparsity": trainer.sparsity,
        }

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(
                "train",
                total=self.trainer.config.total_steps,
                completed=self.trainer.step,
                **self._fields(float("nan")),
            )
        return self

    def update(self, loss: float) -> None:
        """One more step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self.trainer.step, **self._fields(loss))

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()
