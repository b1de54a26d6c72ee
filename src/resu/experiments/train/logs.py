"""What a run writes while it goes on: ``log.csv``, and TensorBoard's events where they are asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from resu.experiments import rows
from resu.experiments.train.typed import ConfigError

__all__ = ["Entry", "Logs", "check_tensorboard"]


@dataclass(frozen=True)
class Entry:
    """One row of ``log.csv``.

    Attributes:
        step: Optimizer steps done.
        loss: Mean training loss since the row before.
        lr: Learning rate of the step.
        sparsity: Of the pruned weights.
        val: The metric on held-out data, where it was measured.
        seconds: Of training so far.
    """

    step: int
    loss: float
    lr: float
    sparsity: float
    val: float | None
    seconds: float


class Logs:
    """Writes entries into a folder; those of steps that will be done again are taken out first.

    Args:
        folder: Of the run.
        step: Steps that are done.
        tensorboard: Whether events are written too.
        write: Whether anything is: the first of several processes does.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool, write: bool = True) -> None:
        self.path, self.write = folder / "log.csv", write
        self._board: Any = None
        if not write:
            return
        kept = [entry for entry in rows.read(self.path, Entry) if entry.step <= step] if step else []
        self.path.unlink(missing_ok=True)
        for entry in kept:
            rows.append(self.path, entry)
        if tensorboard:
            self._board = _writer(folder, step)

    def add(self, entry: Entry) -> None:
        """Write one entry."""
        if not self.write:
            return
        rows.append(self.path, entry)
        if self._board is not None:
            for name, value in asdict(entry).items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, entry.step)

    def close(self) -> None:
        """Write out what is pending."""
        if self._board is not None:
            self._board.close()


def check_tensorboard(wanted: bool) -> None:
    """Stop if events are wanted and the package that writes them is absent.

    Raises:
        ConfigError: If it is.
    """
    if wanted and find_spec("tensorboard") is None:
        raise ConfigError(
            'log.tensorboard needs tensorboard: pip install "resu-torch[tensorboard]" (log.csv has the same figures)'
        )


def _writer(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
