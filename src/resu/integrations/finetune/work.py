"""The folder of a run that is not done: its settings, masks, log and checkpoints, beside the result."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resu.integrations.finetune.config import FinetuneConfig
from resu.integrations.finetune.save import write_json

__all__ = ["Work"]

_SETTINGS, _START = "settings.json", "start.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class Work:
    """``OUT.training``; it goes when the result is there.

    Args:
        out: Where the result will be.
        config: Of the run.
        resume: Whether an interrupted run goes on.
        overwrite: Whether one may be thrown away.

    Raises:
        FileExistsError: If there is one, and neither is said.
        FileNotFoundError: If there is none to go on with.
        ValueError: If it is of other settings; they are named.
    """

    def __init__(self, out: str | os.PathLike[str], config: FinetuneConfig, *, resume: bool, overwrite: bool) -> None:
        target = Path(os.path.realpath(out))
        self.folder = target.with_name(f"{target.name}.training")
        self.config, self.resumes = config, resume
        settings = self.folder / _SETTINGS
        if resume and not settings.is_file():
            raise FileNotFoundError(f"there is no interrupted run {self.folder} to go on with; leave resume=True out")
        if resume:
            try:
                before = json.loads(settings.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{settings} is damaged: {error}; begin anew with overwrite=True") from None
            if different := config.differences(before):
                raise ValueError(f"{self.folder} holds another run, which cannot go on so: {'; '.join(different)}")
        elif self.folder.exists() and not overwrite:
            raise FileExistsError(
                f"{self.folder} holds an interrupted run; go on with it by resume=True, or begin anew by overwrite=True"
            )
        elif self.folder.exists() and any(self.folder.iterdir()) and not settings.is_file():
            raise FileExistsError(f"{self.folder} is no earlier run, so it is not replaced; name another place")

    def begin(self) -> None:
        """Make the folder, empty of what an earlier run left; the first process does."""
        if not self.resumes:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            write_json(self.config.to_json(), self.folder / _SETTINGS)

    def checkpoint(self) -> Path | None:
        """The last checkpoint that was written whole, if the run goes on."""
        return self._last() if self.resumes else None

    def abandon(self) -> None:
        """An error has ended the run: without a checkpoint there is nothing to keep of it."""
        if not self.resumes and self.folder.is_dir() and self._last() is None:
            self.remove()

    def _last(self) -> Path | None:
        found = {int(m[1]): p for p in self.folder.iterdir() if (m := _CHECKPOINT.fullmatch(p.name))}
        whole = [step for step, path in found.items() if (path / "trainer_state.json").is_file()]
        return found[max(whole)] if whole else None

    def note_start(self, values: Mapping[str, Any]) -> None:
        """Remember how good the model was before training."""
        write_json(values, self.folder / _START)

    def start(self) -> dict[str, Any] | None:
        """What :meth:`note_start` wrote, if it did."""
        file = self.folder / _START
        found = json.loads(file.read_text(encoding="utf-8")) if self.resumes and file.is_file() else None
        return found if isinstance(found, dict) else None

    def remove(self) -> None:
        """The run is done."""
        shutil.rmtree(self.folder, ignore_errors=True)
