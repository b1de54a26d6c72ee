"""What an interrupted run of ``prune_checkpoint`` leaves behind, and what a later one may continue."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from resu.core.io import FileFormatError, open_header, replacing, seal_header
from resu.core.pattern import Pattern
from resu.core.ranks import Ranks
from resu.core.shards import Shards
from resu.pruning.allocation import described

__all__ = ["Work", "settings_of"]

_KEY = "resu_pruning"
_VERSION = 1


def settings_of(shards: Shards, options: Mapping[str, Any], layout: str) -> dict[str, Any]:
    """All that decides the bytes of the result, as plain JSON: the options, and which files are the source."""
    stated: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Pattern):
            value = str(value)
        elif callable(value):
            value = described(value)
        elif isinstance(value, frozenset):
            value = sorted(value)
        elif isinstance(value, Iterable) and not isinstance(value, (str, Mapping)):
            value = list(value)
        stated[name] = dict(value) if isinstance(value, Mapping) else value
    source = {}
    for file in shards.files:
        status = (shards.folder / file).stat()
        entries = [(name, e.dtype, list(e.shape), e.start) for name, e in shards.entries.items() if e.file == file]
        digest = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
        source[file] = {"bytes": status.st_size, "changed": status.st_mtime_ns, "header": digest}
    found: dict[str, Any] = json.loads(json.dumps({"options": {**stated, "layout": layout}, "source": source}))
    return found


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Which settings differ, in words."""
    one, other = before["options"], now["options"]
    found = [f"{k} was {one.get(k)!r}, is {other.get(k)!r}" for k in {**one, **other} if one.get(k) != other.get(k)]
    files = {**before["source"], **now["source"]}
    return found + [f"{f} of the source is another" for f in files if before["source"].get(f) != now["source"].get(f)]


class Work:
    """The hidden folder of a run: finished shards as they will be, and notes in a folder of their own inside it.

    Args:
        folder: Where.
        ranks: The processes that share it.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder, self.ranks = folder, ranks
        self.notes = folder / ".notes"

    @property
    def complete(self) -> bool:
        """Whether all is written, and only the folder's name is still to come."""
        return (self.folder / "pruning.json").is_file()

    def state(self, settings: Mapping[str, Any], *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """What an earlier run has decided; None where one starts from nothing.

        Raises:
            FileExistsError: If there is one, and it may be neither continued nor replaced.
            ValueError: If it is damaged, or its settings are others; they are named.
        """
        if not self.folder.exists():
            return None
        if not resume:
            if not overwrite:
                raise FileExistsError(
                    f"an interrupted run is in {self.folder}; pass resume=True to continue it, or overwrite=True to "
                    "begin again"
                )
            return None
        if self.complete:
            report = json.loads((self.folder / "pruning.json").read_text(encoding="utf-8"))
            found = {"settings": report["settings"], "plan": {"keeps": {}, "cuts": {}}}
        else:
            file = self.notes / "state.json"
            if not file.is_file():  # it came no further than to make the folder
                return None
            try:
                found = open_header(_KEY, json.loads(file.read_text(encoding="utf-8")), _VERSION, file)
            except FileFormatError:
                raise
            except ValueError as error:
                raise FileFormatError(f"{file} is damaged: {error}; remove {self.folder} to begin again") from None
        if differences := _differences(found["settings"], settings):
            raise ValueError(
                f"the interrupted run in {self.folder} had other settings: {'; '.join(differences)}. Give the same "
                "ones, or overwrite=True without resume to begin again"
            )
        return found

    def begin(self, settings: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
        """Make the folder, and keep what has been decided."""
        if self.ranks.rank == 0:
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.notes.mkdir(parents=True)
            body = {"version": _VERSION, "settings": settings, "plan": plan}
            with replacing(self.notes / "state.json") as temporary:
                temporary.write_text(json.dumps(seal_header(_KEY, body)), encoding="utf-8")
        self.ranks.barrier()

    def abandon(self) -> None:
        """Remove the folder, so that nothing stands in the way of the next run."""
        gone = self.folder.with_name(f"{self.folder.name}.{secrets.token_hex(4)}")
        try:
            self.folder.rename(gone)  # first: another process may be adding files to it
        except FileNotFoundError:  # another process was quicker
            return
        shutil.rmtree(gone, ignore_errors=True)

    def bits(self, file: str) -> Path:
        """Where the packed masks of a file are."""
        return self.notes / f"{file}.bits"

    def mark(self, file: str, entries: Mapping[str, Any]) -> None:
        """Note that a file is done, with the entries of its masks."""
        with replacing(self.notes / f"{file}.json", overwrite=True) as temporary:
            temporary.write_text(json.dumps(seal_header(_KEY, {"version": _VERSION, "masks": entries})))

    def is_done(self, file: str) -> bool:
        """Whether a file is written whole, and its masks are."""
        return (self.notes / f"{file}.json").is_file() and (self.folder / file).is_file()

    def entries(self, files: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The entries of the masks of these files."""
        found: dict[str, dict[str, Any]] = {}
        for file in files:
            note = self.notes / f"{file}.json"
            found |= open_header(_KEY, json.loads(note.read_text()), _VERSION, note)["masks"]
        return found

    def done(self) -> Path:
        """The folder without the notes and what killed runs left half-written: ready to get its name."""
        shutil.rmtree(self.notes, ignore_errors=True)
        for part in self.folder.glob(".*.part"):
            part.unlink()
        return self.folder
