"""``run.json``: how far a long run got and under which settings, for folders of runs that go on after an interrupt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resu.core.io import FileFormatError, open_header, replacing, seal_header

__all__ = ["read_run", "write_run"]


def read_run(
    path: Path, key: str, version: int, settings: Mapping[str, Any], *, kind: str, advice: str
) -> dict[str, Any]:
    """What :func:`write_run` wrote, checked, of a run with these settings.

    Args:
        path: The file.
        key: Of its sealed header.
        version: The newest that can be read.
        settings: What has to be equal for the run to go on.
        kind: What the run is called in errors, such as ``"a one-shot run"``.
        advice: What to do where settings differ.

    Raises:
        FileFormatError: If the file is damaged.
        ValueError: If it is of a run with other settings; what differs is named.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FileFormatError(f"{path} is damaged: {error}") from None
    if not isinstance(given, dict):
        raise FileFormatError(f"{path} is no file of {kind}")
    body = open_header(key, given, version, path)
    theirs = body["settings"]
    other = [name for name, value in settings.items() if theirs.get(name) != value]
    if other:
        said = "; ".join(f"{n} {_short(theirs.get(n))}, now {_short(settings[n])}" for n in other)
        raise ValueError(f"{path.parent} holds a run with other settings ({said}); {advice}")
    return body


def write_run(path: Path, key: str, body: Mapping[str, Any]) -> None:
    """Write ``run.json``, sealed and whole."""
    with replacing(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(seal_header(key, body)), encoding="utf-8")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "…"
