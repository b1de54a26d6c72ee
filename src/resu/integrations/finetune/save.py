"""The folder that a run leaves: a model that ``from_pretrained`` loads, and what came of the run."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from resu.core.io import replacing
from resu.core.mask_files import write_masks
from resu.core.shards import Shards
from resu.integrations.finetune.model import MASK_FILE
from resu.integrations.finetune.prepared import Masks, Prepared
from resu.integrations.folders import ADAPTER, copy_companions, new_folder
from resu.integrations.hf import check_directory
from resu.integrations.hf_names import masks_as_stored
from resu.integrations.hf_save import seal_folder, stored_names, write_model

__all__ = ["ADAPTER", "LOG", "REPORT", "save_run", "write_json"]

REPORT, LOG = "run.json", "log.csv"


def write_json(values: Any, path: Path) -> None:
    """Write plain values, whole or not at all; what is there is replaced."""
    values = _finite(values)
    with replacing(path, overwrite=True) as temporary:
        text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """NaN and infinities as null, which any parser reads."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_run(
    model: Any,
    tokenizer: Any,
    masks: Masks,
    report: dict[str, Any],
    source: Path,
    out: str | os.PathLike[str],
    *,
    log: Path | None = None,
    adapter: Path | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a fine-tuned model as a Hugging Face directory, whole or not at all.

    Args:
        model: A plain ``PreTrainedModel``.
        tokenizer: Written with it, unless the files of the source are copied.
        masks: What is pruned of it, by parameter name; empty: no mask file.
        report: Plain values; becomes ``run.json``.
        source: Where the model comes from. If the result is a model of the same class, everything beside its weights is
            copied.
        out: The folder to write; the one above it must exist.
        log: A file to copy there as ``log.csv``.
        adapter: A folder to copy there as ``adapter``.
        max_shard_size: Largest weight file, such as ``"5GB"``.
        overwrite: Whether an earlier result may be replaced (:func:`resu.integrations.folders.new_folder`).

    Returns:
        The report as written, with ``bytes`` of the weights.

    Raises:
        FileExistsError: If ``out`` holds something that may not be replaced.
    """
    with new_folder(out, overwrite=overwrite) as temporary:
        write_model(model, temporary, max_shard_size)
        same = type(model).__name__ in (check_directory(source).get("architectures") or [])
        if same:
            copy_companions(source, temporary)
        else:
            tokenizer.save_pretrained(temporary)
        seal_folder(temporary)
        written = Shards.open(temporary)
        if masks:
            stored = stored_names(model, written)
            named = {stored.get(name, name): mask for name, mask in masks.items()}
            parts = masks_as_stored(model, named, written)
            named = {part: one for name, mask in named.items() for part, one in parts.get(name, {name: mask}).items()}
            pruned, numel = sum(m.n_pruned for m in masks.values()), sum(m.numel for m in masks.values())
            write_masks(named, temporary / MASK_FILE, {"sparsity": pruned / numel, "method": report["method"]})
        if log is not None and log.is_file():
            shutil.copyfile(log, temporary / LOG)
        if adapter is not None:
            shutil.copytree(adapter, temporary / ADAPTER, dirs_exist_ok=True)
        report = {**report, "bytes": sum(written.nbytes(name) for name in written.names)}
        write_json(report, temporary / REPORT)
    return report


def save_adapter(prepared: Prepared, folder: Path) -> None:
    """Write what was trained apart from the weights, before it is merged.

    Raises:
        ValueError: If the method has no such thing.
    """
    if prepared.save_adapter is None:
        raise ValueError("only lora and sparse-lora train an adapter that can be kept; θ is a part of the weights")
    shutil.rmtree(folder, ignore_errors=True)
    prepared.save_adapter(folder)
