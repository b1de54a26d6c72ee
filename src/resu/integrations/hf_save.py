"""A pruned model written as a Hugging Face directory that ``from_pretrained`` loads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resu.core.mask import SparseMask
from resu.core.mask_files import write_masks, write_safetensors
from resu.core.shards import INDEX, Shards
from resu.formats.compressed import write_compressed
from resu.formats.shards import write_shard
from resu.integrations.carried import KEPT, carried_masks, sparser_before
from resu.integrations.folders import copy_companions, new_folder
from resu.integrations.hf import has_tokenizer, quiet
from resu.integrations.hf_names import masks_as_stored

__all__ = ["LAYOUTS", "not_carried", "restore_dtypes", "save_pruned", "seal_folder", "stored_names", "write_model"]

LAYOUTS = ("dense", "bitmask")


def save_pruned(
    model: Any,
    tokenizer: Any,
    result: Any,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    layout: str = "dense",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a pruned model as a Hugging Face directory, whole or not at all.

    ``from_pretrained`` loads it: weights with exact zeros, with the names, dtypes and ties of the source;
    ``config.json``, tokenizer and every other file that lies beside the weights (``1_Pooling`` and ``modules.json``
    of sentence encoders, licence). Added are ``masks.safetensors``, ``pruning.json``, the report, and in the headers of
    the weight files a checksum for each tensor, which ``resu validate`` compares.

    Args:
        model: A ``PreTrainedModel`` from :func:`resu.integrations.hf.load_model`, pruned in place.
        tokenizer: Written where the source directory has none of its own; may be None.
        result: A :class:`resu.pruning.one_shot.PruneResult`.
        source: The directory the model comes from.
        out: The folder to write; the one above it must exist.
        dtype: That :func:`resu.integrations.hf.load_model` was given, so that the configuration says the new one.
        layout: ``"dense"``, or ``"bitmask"``: kept values and one bit per weight in place of each pruned weight
            (``sparse-bitmask`` of compressed-tensors, one file), which ``resu convert`` turns into the dense layout.
        max_shard_size: Largest file, e.g. ``"5GB"``.
        overwrite: Whether an earlier result in ``out`` may be replaced (:func:`resu.integrations.folders.new_folder`).

    Returns:
        The report as written: that of ``result`` with ``source``, ``layout`` and ``bytes``; its ``warnings`` also name
        the tensors and weight files of the source that the output lacks (dense weights in other formats, for one).

    Raises:
        FileExistsError: If ``out`` holds something that may not be replaced.
        FileNotFoundError: If the folder above ``out`` does not exist.
    """
    folder = Path(source)
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not known; known: {', '.join(LAYOUTS)}")
    with new_folder(out, overwrite=overwrite) as temporary:
        write_model(model, temporary, max_shard_size)
        before, after = Shards.open(folder), Shards.open(temporary)
        if dtype is None:
            restore_dtypes(after, {name: before.dtype(name) for name in before.names})
            (temporary / "config.json").write_bytes((folder / "config.json").read_bytes())  # as its author wrote it
        left_out = copy_companions(folder, temporary)
        if tokenizer is not None and not has_tokenizer(temporary):
            tokenizer.save_pretrained(temporary)
        lost = [f"tensor {n} is not in the output" for n in not_carried(model, before, after)]
        lost += [f"{file} was not copied: it holds unpruned weights" for file in left_out]
        stored = stored_names(model, after)
        report = {
            **result.report,
            "layers": [{**row, "name": stored.get(row["name"], row["name"])} for row in result.report["layers"]],
            "source": str(folder),
            "layout": layout,
            "bytes": sum(after.nbytes(name) for name in after.names),
            "warnings": [*result.report["warnings"], *lost],
        }
        masks = {
            stored.get(name, name): mask if isinstance(mask, SparseMask) else SparseMask(mask)
            for name, mask in result.masks.items()
        }
        parts = masks_as_stored(model, masks, after)
        masks = {part: one for name, mask in masks.items() for part, one in parts.get(name, {name: mask}).items()}
        report["layers"] = [line for row in report["layers"] for line in _rows_of_parts(row, parts.get(row["name"]))]
        kept = {name: mask.n_active for name, mask in masks.items()}
        report["warnings"] += sparser_before(folder, kept)
        prefix = f"{model.base_model_prefix}."
        every = sum(p.numel() for p in model.parameters())
        for name, mask in carried_masks(folder, after.shapes, set(masks), prefix):
            masks[name] = mask
            report["skipped"] = {**report["skipped"], name: report["skipped"].get(name, "left as it is") + KEPT}
            report["total"] += mask.n_pruned / every
        if layout == "bitmask":
            report["bytes"] = _to_bitmask(after, masks)
        else:
            seal_folder(temporary)
        summary = {key: report.get(key) for key in ("method", "pattern", "distribution", "sparsity", "actual")}
        write_masks(masks, temporary / "masks.safetensors", summary)
        text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
        (temporary / "pruning.json").write_text(text + "\n", encoding="utf-8")
    return report


def _rows_of_parts(row: dict[str, Any], parts: Mapping[str, SparseMask] | None) -> list[dict[str, Any]]:
    if parts is None:
        return [row]
    return [
        {**row, "name": name, "shape": list(m.shape), "kept": m.n_active, "numel": m.numel, "sparsity": m.sparsity}
        for name, m in parts.items()
    ]


def write_model(model: Any, folder: Path, max_shard_size: str) -> None:
    """Weights and ``config.json``. The generation settings of the source are copied as a file instead: transformers
    refuses to write those it finds inconsistent, as those of many published models are.
    """
    from transformers import GenerationConfig

    settings = getattr(model, "generation_config", None)
    try:
        if settings is not None:
            model.generation_config = GenerationConfig()
        with quiet():
            model.save_pretrained(folder, max_shard_size=max_shard_size)
    finally:
        if settings is not None:
            model.generation_config = settings
    (folder / "generation_config.json").unlink(missing_ok=True)
    for file in folder.glob("*.safetensors"):  # which safetensors lets only the owner read
        file.chmod((folder / "config.json").stat().st_mode & 0o777)


def _tied_names(model: Any) -> list[list[str]]:
    """The names of each weight that has more than one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def stored_names(model: Any, after: Shards) -> dict[str, str]:
    """Of tied weights, which are stored once: each name and the one in the file."""
    held = set(after.names)
    found: dict[str, str] = {}
    for group in _tied_names(model):
        in_file = [name for name in group if name in held]
        found |= {name: in_file[0] for name in group if in_file and name not in held}
    return found


def not_carried(model: Any, before: Shards, after: Shards) -> list[str]:
    """Tensors of the source that are not in the output, other names of tied weights aside."""
    tied = {name for group in _tied_names(model) for name in group}
    prefix = f"{model.base_model_prefix}."  # with or without it, it is the same tensor to from_pretrained
    # Buffers are in the model whether a file has them or not (position_ids of older checkpoints).
    buffers = {name for name, _ in model.named_buffers()}
    known = {name.removeprefix(prefix) for name in (*after.names, *tied, *buffers)}
    return sorted(name for name in before.names if name.removeprefix(prefix) not in known)


def restore_dtypes(after: Shards, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give every tensor the dtype it has in the source, where a checkpoint mixes several."""
    wrong = {n for n in after.names if after.dtype(n) != dtypes.get(n, after.dtype(n))}
    for file in sorted({after.file_of(name) for name in wrong}):
        tensors: dict[str, Tensor] = {}
        for name in after.names:
            if after.file_of(name) == file:
                tensors[name] = after.read(name)
                if name in wrong:
                    tensors[name] = tensors[name].to(dtypes[name])
        write_safetensors(tensors, after.folder / file, after.metadata[file])


def seal_folder(folder: Path) -> None:
    """Write the weight files again with a checksum for each tensor, as those of methods without data have them."""
    shards = Shards.open(folder)
    bits = folder / ".bits"  # there is nothing left to prune, so it stays empty
    for file in shards.files:
        write_shard(shards, file, folder / file, {}, bits, overwrite=True)
        bits.unlink()


def _to_bitmask(shards: Shards, masks: Mapping[str, SparseMask]) -> int:
    """Replace the dense files of a folder by one in the bitmask layout; returns the bytes of its tensors."""
    config = json.loads((shards.folder / "config.json").read_text(encoding="utf-8"))
    state = {name: shards.read(name) for name in shards.names}
    for file in (*shards.files, *([INDEX] if shards.index is not None else [])):
        (shards.folder / file).unlink()
    write_compressed(state, masks, shards.folder, config=config, overwrite=True)
    packed = Shards.open(shards.folder)
    return sum(packed.nbytes(name) for name in packed.names)
