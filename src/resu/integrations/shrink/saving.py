"""A smaller transformer written as a Hugging Face directory, whole or not at all."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from resu.core.shards import Shards
from resu.integrations.folders import copy_companions, new_folder
from resu.integrations.hf import check_directory
from resu.integrations.hf_save import not_carried, restore_dtypes, seal_folder, write_model
from resu.integrations.shrink.config import builds
from resu.integrations.shrink.families import family_of
from resu.integrations.shrink.removal import RemovalError

__all__ = ["save_shrunk"]


def save_shrunk(
    model: Any,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    report: Mapping[str, Any],
    before: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a model with fewer heads, neurons or blocks; everything beside the weights is copied.

    ``config.json`` is that of the source with the keys changed whose values are others now. It is loaded by
    ``from_pretrained``, or by :func:`resu.integrations.shrink.loading.load_shrunk_transformer` where its architecture
    cannot be told its sizes.

    Args:
        model: After :func:`resu.integrations.shrink.removal.remove`.
        source: The directory it comes from.
        out: The folder to write; the one above it must exist.
        report: Plain values, written as ``pruning.json``; ``blocks`` are the indices of those that stayed.
        before: ``model.config.to_dict()`` before the removal.
        overwrite: Whether an earlier result may be replaced (:func:`resu.integrations.folders.new_folder`).

    Returns:
        The report as written, with ``bytes`` of the weights and ``warnings``.

    Raises:
        FileExistsError: If ``out`` holds something that may not be replaced.
        RemovalError: If the new ``config.json`` would not give the model.
    """
    folder = Path(source)
    with new_folder(out, overwrite=overwrite) as temporary:
        write_model(model, temporary, "5GB")
        stored, place = Shards.open(folder), _Places(family_of(model).blocks, report["blocks"])
        dtypes = {name: stored.dtype(name) for name in stored.names}
        weights = Shards.open(temporary)
        restore_dtypes(weights, {n: dtypes[place.before(n)] for n in weights.names if place.before(n) in dtypes})
        lost = [name for name in not_carried(model, stored, weights) if not place.within(name)]
        seal_folder(temporary)
        config = changed_config(check_directory(folder), before, model.config)
        if not builds(type(model.config).from_dict(deepcopy(config)), model):
            raise RemovalError(
                f"the config.json of {folder} says sizes of {type(model).__name__} in a way that is not known here, "
                "so what would be written could not be loaded; nothing was"
            )
        text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False)
        (temporary / "config.json").write_text(text + "\n", encoding="utf-8")
        left_out = copy_companions(folder, temporary)
        weights = Shards.open(temporary)
        warnings = [f"tensor {name} is not in the output" for name in lost]
        warnings += [f"{file} was not copied: it holds the weights as they were" for file in left_out]
        if (folder / "masks.safetensors").is_file():
            but = " but where the update has fitted weights" if report.get("update") else ""
            warnings.append(
                f"masks.safetensors was not copied: masks are of the former sizes (zeros stay zeros{but}; resu "
                "finetune --mask zeros holds them)"
            )
        written = {
            **report,
            "bytes": sum(weights.nbytes(name) for name in weights.names),
            "warnings": [*report.get("warnings", ()), *warnings],
        }
        text = json.dumps(_finite(written), indent=2, ensure_ascii=False, allow_nan=False)
        (temporary / "pruning.json").write_text(text + "\n", encoding="utf-8")
    return written


class _Places:
    """Where a tensor of a block was before blocks went."""

    def __init__(self, path: str, blocks: Sequence[int]) -> None:
        self._pattern = re.compile(rf"(?:^|(?<=\.)){re.escape(path)}\.(\d+)\.")
        self._path, self._blocks = path, blocks

    def within(self, name: str) -> bool:
        return self._pattern.search(name) is not None

    def before(self, name: str) -> str:
        return self._pattern.sub(lambda found: f"{self._path}.{self._blocks[int(found[1])]}.", name, count=1)


def _finite(value: Any) -> Any:
    """Infinities (the perplexity of a model that was ruined) as null, which any parser reads."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def changed_config(stated: Mapping[str, Any], before: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """A ``config.json`` as its author wrote it, but for what has changed.

    Args:
        stated: The file.
        before: What was read from it, as a dictionary.
        config: What must be read from the new one.
    """
    was, now = json.loads(json.dumps(before, default=str)), _read(config)
    changed = {key: value for key, value in now.items() if key not in was or was[key] != value}
    found = {key: value for key, value in stated.items() if key in now or key not in was} | changed
    for alias, key in type(config).attribute_map.items():  # two names of one number must not disagree
        if key in changed and alias in found:
            found[alias] = changed[key]
    # What a configuration computes from other keys where it is not said: the size of a head of many a Llama.
    read_before, read = (_read(type(config).from_dict(deepcopy(dict(given)))) for given in (stated, found))
    derived = {k: v for k, v in now.items() if read.get(k) != v and read_before.get(k) == was.get(k)}
    return found | derived


def _read(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return found
