"""Models from one layout to another, weight by weight: dense with zeros, bitmask, 2:4 bitmask."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from resu.core.io import FileFormatError, replacing
from resu.core.mask_files import MASK_HEADER, read_masks, write_masks
from resu.core.shards import INDEX, Shards
from resu.formats.files import CHECKPOINT_HEADER, load_checkpoint, save_checkpoint
from resu.formats.relayout import MASK_FILE, REPORT_FILE, TARGETS, Plan, plan_layout
from resu.formats.sealed import SealedWriter
from resu.formats.stored import Stored
from resu.integrations.folders import check_apart, copy_companions, new_folder

__all__ = ["convert", "write_folder"]

Progress = Callable[[int, int, str], None]


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str,
    *,
    masks: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a model in another layout; weights, dtypes, ties, files and everything beside the weights are kept.

    A folder becomes a folder with the same files, written whole or not at all, one weight in memory at a time. The
    masks go with it as ``masks.safetensors``, since a dense file does not say which of its zeros are kept weights.
    A single safetensors file becomes one file, a dense one with its masks in ``NAME.masks.safetensors`` beside it; a
    checkpoint of this library keeps all that is in it.

    Args:
        source: A model folder or a safetensors file, in any of the layouts.
        out: The folder or file to write.
        to: ``"dense"``, ``"bitmask"`` or ``"sparse-24"`` (masks that keep exactly 2 of each 4).
        masks: A mask file; None: those of the layout, and of ``masks.safetensors`` beside the weights.
        overwrite: Whether an earlier result at ``out`` may be replaced.
        progress: Called with ``(done, total, name)``.

    Returns:
        ``source, out, layout, packed`` and ``dense`` (how many masked weights are stored so), ``bytes_before``,
        ``bytes_after``, ``total`` (``numel, kept, sparsity`` over the masks).

    Raises:
        FileNotFoundError: If there is nothing at ``source`` or ``masks``.
        FileExistsError: If ``out`` holds something that may not be replaced.
        ValueError: If a file is damaged, there are no masks to make a sparse layout from, a mask does not fit its
            weight or the layout, or a weight is not zero where its mask prunes.

    Example:
        >>> import tempfile
        >>> from resu.formats.compressed import write_compressed
        >>> keep = torch.tensor([[True, False, True, False]])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_compressed({"fc.weight": torch.eye(1, 4)}, {"fc.weight": keep}, f"{folder}/a")
        ...     _ = convert(f"{folder}/a", f"{folder}/b", "dense")
        ...     Stored.open(f"{folder}/b").read("fc.weight")[0], sorted(p.name for p in Path(folder, "b").iterdir())
        (tensor([[1., 0., 0., 0.]]), ['config.json', 'masks.safetensors', 'model.safetensors', 'pruning.json'])
    """
    if to not in TARGETS:
        raise ValueError(f"cannot convert to {to!r}; known: {', '.join(TARGETS)}")
    source, out = Path(source), Path(out)
    check_apart(out, source, masks)
    if source.is_file() and out.is_dir():
        raise ValueError(f"{source} is a file and {out} a folder; name a .safetensors file to write")
    if source.is_file() and out.suffix != ".safetensors":
        raise ValueError(f"{source} is a file, so the result is one: name a .safetensors file to write, not {out.name}")
    stored = Stored.open(source)
    if any(MASK_HEADER in metadata for metadata in stored.shards.metadata.values()):
        raise ValueError(f"{source} holds masks, not weights; give them by --masks with the weights they belong to")
    ours = [file for file, metadata in stored.shards.metadata.items() if CHECKPOINT_HEADER in metadata]
    if ours and source.is_dir():
        raise ValueError(f"{source / ours[0]} is a checkpoint of resu; convert that file")
    if ours:
        return _checkpoint(source, out, to, masks, overwrite)
    plan = plan_layout(stored, source, to, masks)
    if source.is_file():
        _convert_file(plan, source, out, overwrite, progress)
        return _report(plan, source, out)
    return write_folder(plan, source, out, overwrite=overwrite, progress=progress)


def write_folder(
    plan: Plan,
    source: Path,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    more: Callable[[Path], None] = lambda folder: None,
) -> dict[str, Any]:
    """Write a model folder as planned, whole or not at all, one weight in memory at a time.

    Args:
        plan: What becomes of each weight.
        source: The folder it is made for; what lies beside the weights is copied.
        out: The folder to write.
        overwrite: Whether an earlier result at ``out`` may be replaced.
        progress: Called with ``(done, total, name)``.
        more: Writes further files into the folder, before it gets its name.

    Returns:
        The report of :func:`convert`.
    """
    with new_folder(out, overwrite=overwrite) as temporary:
        done = 0
        for file in plan.stored.shards.files:
            if names := plan.names_of(file):
                (temporary / file).touch()
                _write_file(plan, file, temporary / file, done, progress)
                done += len(names)
        _write_beside(plan, source, temporary)
        more(temporary)
    return _report(plan, source, out)


def _convert_file(plan: Plan, source: Path, out: Path, overwrite: bool, progress: Progress | None) -> None:
    """One file; the masks go beside it where a dense one can no longer tell them."""
    beside = out.with_suffix(".masks.safetensors") if plan.masks and not plan.packed else None
    if beside is not None and beside.exists() and not overwrite:
        raise FileExistsError(f"{beside} is there already; pass overwrite=True to replace it")
    with replacing(out, overwrite=overwrite) as temporary:
        _write_file(plan, source.name, temporary, 0, progress)
        if beside is not None:
            write_masks(plan.masks, beside, plan.metadata, overwrite=overwrite)


def _report(plan: Plan, source: Path, out: Path) -> dict[str, Any]:
    """What has been done, as plain values."""
    before, after = plan.stored.shards, Shards.open(out)
    numel = sum(mask.numel for mask in plan.masks.values())
    kept = sum(mask.n_active for mask in plan.masks.values())
    return {
        "source": str(source),
        "out": str(out),
        "layout": plan.layout,
        "packed": len(plan.packed),
        "dense": len(plan.masks.keys() - set(plan.packed)),
        "bytes_before": sum(before.nbytes(name) for name in before.names),
        "bytes_after": sum(after.nbytes(name) for name in after.names),
        "total": {"numel": numel, "kept": kept, "sparsity": (numel - kept) / numel if numel else 0.0},
    }


def _write_file(plan: Plan, file: str, target: Path, done: int, progress: Progress | None) -> None:
    names = plan.names_of(file)
    parts = {part: what for name in names for part, what in plan.parts(name).items()}
    total = len(plan.stored.names)
    ties = {alias: owner for alias, owner in plan.stored.ties.items() if owner in names}
    kept = {k: v for k, v in plan.stored.shards.metadata[file].items() if not k.startswith("resu_")}
    writer = SealedWriter(target, parts, ties, kept)
    for number, name in enumerate(names, start=done + 1):
        for part, tensor in plan.tensors(name).items():
            writer.add(part, tensor)
        if progress is not None:
            progress(number, total, name)
    writer.close()


def _write_beside(plan: Plan, source: Path, folder: Path) -> None:
    """Index, config, masks, report, and whatever else lies beside the weights."""
    if len(plan.stored.shards.files) > 1 or plan.stored.shards.index is not None:
        places = {
            part: file for file in plan.stored.shards.files for n in plan.names_of(file) for part in plan.parts(n)
        }
        size = sum(
            torch.Size(shape).numel() * dtype.itemsize
            for name in plan.stored.names
            for dtype, shape in plan.parts(name).values()
        )
        old = dict((plan.stored.shards.index or {}).get("metadata") or {})
        index = {"metadata": {**old, "total_size": size}, "weight_map": dict(sorted(places.items()))}
        _write_json(folder / INDEX, index)
    if plan.packed or (source / "config.json").is_file():
        _write_json(folder / "config.json", plan.config())
    if plan.masks:
        write_masks(plan.masks, folder / MASK_FILE, plan.metadata)
    _write_json(folder / REPORT_FILE, _pruning_report(plan, source))
    copy_companions(source, folder)


def _pruning_report(plan: Plan, source: Path) -> dict[str, Any]:
    """That of the source; of a model that another library has pruned, what its masks say."""
    if (source / REPORT_FILE).is_file():
        try:
            report = json.loads((source / REPORT_FILE).read_text(encoding="utf-8"))
            return {**report, "layout": plan.layout}
        except (ValueError, TypeError) as error:
            raise FileFormatError(f"{source / REPORT_FILE} is damaged: {error}; mend it or take it away") from None
    layers = [
        {"name": n, "shape": list(m.shape), "kept": m.n_active, "numel": m.numel, "sparsity": m.sparsity}
        for n, m in plan.masks.items()
    ]
    return {"converted": str(source), "layout": plan.layout, "layers": layers}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _checkpoint(
    source: Path, out: Path, to: str, masks: str | os.PathLike[str] | None, overwrite: bool
) -> dict[str, Any]:
    if to == "sparse-24":
        raise ValueError(f"{source} is a checkpoint of resu; those are dense or bitmask")
    found = load_checkpoint(source)
    given = read_masks(masks)[0] if masks is not None else found.masks
    if to == "bitmask" and not given:
        raise ValueError(f"{source} has no masks; name a mask file (--masks)")
    save_checkpoint(
        found.state,
        out,
        masks=given,
        extra=found.extra,
        metadata=found.metadata,
        layout=to,
        overwrite=overwrite,
    )
    numel, kept = sum(mask.numel for mask in given.values()), sum(mask.n_active for mask in given.values())
    packed = len(Stored.open(out).packed)
    return {
        "source": str(source),
        "out": str(out),
        "layout": TARGETS[to],
        "packed": packed,
        "dense": len(given) - packed,
        "bytes_before": source.stat().st_size,
        "bytes_after": out.stat().st_size,
        "total": {"numel": numel, "kept": kept, "sparsity": (numel - kept) / numel if numel else 0.0},
    }
