"""The folder of an iterative run: a checkpoint per stage, and one small file that says how far it got."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from resu.core.mask import SparseMask
from resu.core.mask_files import read_masks, write_masks
from resu.pruning.run_notes import read_run, write_run
from resu.pruning.snapshots import model_checksum, random_state, read_model, set_random_state, write_model

__all__ = ["RunFolder"]

_KEY, _VERSION = "resu_stages", 1


class RunFolder:
    """``run.json``, and per stage ``stage-01.safetensors`` (weights and buffers) and ``stage-01.masks.safetensors``.

    ``stage-00`` is the model before the first stage. Each file is written atomically and ``run.json`` last, so that
    what it names is whole; the stage that was running when a process died is done again.

    Args:
        path: Made if it is not there.
        settings: What has to be equal for a run to go on; plain JSON.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.body: dict[str, Any] = {}

    def _model(self, stage: int) -> Path:
        return self.path / f"stage-{stage:02d}.safetensors"

    def _masks(self, stage: int) -> Path:
        return self.path / f"stage-{stage:02d}.masks.safetensors"

    @property
    def _run(self) -> Path:
        return self.path / "run.json"

    def exists(self) -> bool:
        """Whether there is a run here."""
        return self._run.is_file()

    def open(self, model: nn.Module) -> dict[str, Any]:
        """The run that is here: ``records``, ``baseline``, ``ended``. Nothing is loaded into the model yet.

        Raises:
            FileFormatError: If ``run.json`` is damaged.
            ValueError: If it is a run with other settings, or of another model.
        """
        advice = "use another checkpoint_dir, or resume=False with overwrite=True to start over in this one"
        body = read_run(self._run, _KEY, _VERSION, self.settings, kind="an iterative run", advice=advice)
        known = [entry["checksum"] for entry in body["checkpoints"]]
        if model_checksum(model) not in known:
            raise ValueError(
                f"{self.path} holds a run that began with other weights than this model has; going on would replace "
                f"them: {advice}"
            )
        self.body = body
        return body

    def begin(self, model: nn.Module, baseline: float | None, *, overwrite: bool) -> None:
        """Start a run: the model as it is becomes stage 0."""
        if overwrite:
            for file in self.path.glob("stage-*.safetensors"):
                file.unlink()
            self._run.unlink(missing_ok=True)
        self.body = {
            "version": _VERSION,
            "settings": self.settings,
            "baseline": baseline,
            "records": [],
            "checkpoints": [],
            "ended": False,
        }
        self._add(model, {}, 0)

    def _add(self, model: nn.Module, masks: Mapping[str, SparseMask], stage: int) -> None:
        # A file that run.json does not name yet is a leftover of a stage that did not end.
        write_model(model, self._model(stage), overwrite=True)
        if stage:
            write_masks(masks, self._masks(stage), {"stage": stage}, overwrite=True)
        self.body["checkpoints"].append({"checksum": model_checksum(model), "random": random_state()})
        self._write()

    def add(self, model: nn.Module, masks: Mapping[str, SparseMask], record: Mapping[str, Any], *, ended: bool) -> None:
        """A stage is done and stays."""
        self.body["records"].append(dict(record))
        self.body["ended"] = ended
        self._add(model, masks, len(self.body["checkpoints"]))

    def reject(self, record: Mapping[str, Any]) -> None:
        """A stage is done and was taken back; the run ends."""
        self.body["records"].append(dict(record))
        self.body["ended"] = True
        self._write()

    def _write(self) -> None:
        write_run(self._run, _KEY, self.body)

    def restore(self, model: nn.Module, *, randomness: bool) -> dict[str, SparseMask]:
        """Put the last checkpoint into ``model``, in place; returns its masks.

        Raises:
            FileFormatError: If a file is damaged; it is named.
        """
        stage = len(self.body["checkpoints"]) - 1
        entry = self.body["checkpoints"][stage]
        masks = read_masks(self._masks(stage))[0] if stage else {}
        read_model(model, self._model(stage), entry["checksum"])
        if randomness:
            set_random_state(entry["random"])
        return masks
