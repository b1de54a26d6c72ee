"""The folder of a run: what is in it, and whether a run may use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from resu.core.ranks import Ranks
from resu.experiments.train.config import Config
from resu.experiments.train.reading import as_config, read_mapping
from resu.experiments.train.result import Result, read_result, write_json
from resu.experiments.train.typed import ConfigError, plain

__all__ = ["CHECKPOINT", "CONFIG", "FILES", "MASKS", "MODEL", "RESULT", "claim", "look"]

CONFIG, LOG, CHECKPOINT = "config.json", "log.csv", "checkpoint.safetensors"
RESULT, MODEL, MASKS = "result.json", "model.safetensors", "masks.safetensors"
FILES = (CONFIG, LOG, CHECKPOINT, RESULT, MODEL, MASKS)

# What may differ between a run and its continuation: how it is computed and what it says, not what is learned.
_FREE = ("log", "compute")


def look(out: Path, config: Config, resume: bool, force: bool) -> Result | None:
    """See whether a run may use a folder; nothing is written.

    Returns:
        The result of a finished run that shall go on; None otherwise.

    Raises:
        FileExistsError: If it holds a run already, and neither ``resume`` nor ``force`` is said.
        ConfigError: If it holds another run than the one that shall go on.
    """
    taken = [name for name in FILES if (out / name).exists()]
    if resume and CONFIG in taken:
        _check_same(out / CONFIG, config)
        return read_result(out / RESULT) if RESULT in taken else None
    if taken and not force:
        raise FileExistsError(
            f"{out} holds a run ({taken[0]}): go on with it (resume), replace it (force), or name another folder"
        )
    return None


def claim(out: Path, config: Config, resume: bool, ranks: Ranks) -> None:
    """Make the folder that of this run; what an earlier one left goes, unless it is the same that goes on."""
    ranks.barrier()  # each process has looked before the first one writes
    if ranks.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        for name in () if resume else FILES:
            (out / name).unlink(missing_ok=True)
        write_json(out / CONFIG, plain(config))
    ranks.barrier()


def _check_same(path: Path, config: Config) -> None:
    """Stop if a run in a folder is another one."""
    before, now = (_flat(plain(c)) for c in (as_config(read_mapping(path)), config))
    different = [
        f"{key} was {json.dumps(before.get(key))}, is {json.dumps(now.get(key))}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and key.partition(".")[0] not in _FREE
    ]
    if different:
        raise ConfigError(
            f"{path.parent} holds another run, which cannot go on with this configuration: {'; '.join(different)}"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
