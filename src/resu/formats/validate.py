"""Whether a checkpoint, a mask file or a pruned model folder is what it should be; every finding has its name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resu.core.counting import check_sparsity
from resu.core.io import FileFormatError
from resu.core.layers import conv1d_globs
from resu.core.mask import SparseMask
from resu.core.mask_files import MASK_FORMATS, MASK_HEADER, read_masks
from resu.core.pattern import Pattern, get_pattern
from resu.core.shards import SINGLE, read_header
from resu.formats.checks import check_counts, check_mask, check_report, check_values, check_weight
from resu.formats.files import CHECKPOINT_HEADER, MODE_SETTINGS, parse_checkpoint, read_safetensors
from resu.formats.relayout import MASK_FILE, REPORT_FILE
from resu.formats.stored import Stored

__all__ = ["validate"]

_HEADS = ("lm_head.weight", "embed_out.weight", "output_projection.weight")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "shared.weight")


@dataclass
class _Findings:
    """What is being collected."""

    violations: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, *problems: str) -> None:
        self.violations += [{"name": name, "problem": problem} for problem in problems]


def validate(
    path: str | os.PathLike[str],
    *,
    masks: str | os.PathLike[str] | None = None,
    sparsity: float | None = None,
    pattern: str | Pattern | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Check files: checksums, shapes, masks, exact zeros, counts, pattern, ties, finite values.

    One weight is in memory at a time. What is wrong with the files under test is a finding, not an error.

    Args:
        path: A mask file, a checkpoint, any safetensors file, or a model folder, dense or in a sparse layout.
        masks: A mask file; None: ``masks.safetensors`` beside the weights, if it is there.
        sparsity: What all masks together should have; their count must be one that exact pruning gives (over all
            weights, per layer or per row).
        pattern: What each mask should have, such as ``"2:4"``.
        progress: Called with ``(done, total, name)``.

    Returns:
        Plain values, ready for JSON: ``path``, ``kind`` (``"masks"``, ``"checkpoint"``, ``"model"``), ``ok``,
        ``violations`` (each with ``name`` and ``problem``), ``notes``, ``tensors`` (rows with ``name, shape, dtype,
        layout, numel, kept, sparsity, minus_zeros, checksum, ok``; ``kept`` is None without a mask, ``checksum`` True
        where the file has one) and ``total`` (``numel, kept, sparsity`` over the masks).

    Raises:
        FileNotFoundError: If there is nothing at ``path`` or at ``masks``.
        ValueError: If ``path`` is of a kind that is not known or a pickle, if ``masks`` is damaged, or on a sparsity or
            pattern that does not exist.

    Example:
        >>> import tempfile
        >>> from resu.core.mask_files import write_masks
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_masks({"w": SparseMask(torch.tensor([[True, True, True, False]]))}, f"{folder}/m.npz")
        ...     validate(f"{folder}/m.npz", pattern="2:4")["violations"]
        [{'name': 'w', 'problem': 'breaks 2:4 in 1 places'}]
    """
    path = Path(path)
    if sparsity is not None:
        check_sparsity(sparsity)
    wanted = get_pattern(pattern) if pattern is not None else None
    given = read_masks(masks)[0] if masks is not None else None
    found = _Findings()
    kind, against = "model", dict(given or {})
    try:
        kind = _kind(path)
        if kind == "masks":
            against = _mask_file(path, given, found)
        elif kind == "checkpoint":
            against = _checkpoint(path, given, found)
        else:
            against = _model(path, given, found, progress)
    except (FileFormatError, FileNotFoundError) as error:  # what the files under test are is what is being asked
        if not path.exists():
            raise
        found.add(str(path), str(error))
    other_way = conv1d_globs(_model_type(path)) if kind == "model" else ()
    for name, mask in against.items():
        found.add(name, *check_mask(mask, wanted, transposed=any(fnmatchcase(f".{name}", glob) for glob in other_way)))
    if sparsity is not None:
        if against:
            found.add("all masks", *check_counts(against, sparsity, wanted))
        elif not found.violations:
            found.add(str(path), "there are no masks to compare the sparsity with; name a mask file")
    return _report(path, kind, against, found)


def _kind(path: Path) -> str:
    if path.is_dir():
        if not (path / SINGLE).is_file():
            return "model"
        path = path / SINGLE
    elif not path.is_file():
        raise FileNotFoundError(f"there is no file or folder {path}")
    elif path.suffix.removeprefix(".") not in MASK_FORMATS:
        known = ", ".join(f".{ending}" for ending in MASK_FORMATS)
        raise ValueError(f"{path} has an ending that is not known; known: {known}, or a folder")
    elif path.suffix != ".safetensors":
        return "masks"
    metadata = read_header(path)[1]
    if any(key.startswith(MASK_HEADER) for key in metadata):
        return "masks"
    return "checkpoint" if any(key.startswith(CHECKPOINT_HEADER) for key in metadata) else "model"


def _row(name: str, shape: Any, dtype: Any, layout: str, mask: SparseMask | None, checksum: bool) -> dict[str, Any]:
    return {
        "name": name,
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "layout": layout,
        "numel": torch.Size(shape).numel(),
        "kept": mask.n_active if mask is not None else None,
        "sparsity": mask.sparsity if mask is not None else None,
        "minus_zeros": 0,
        "checksum": checksum,
    }


def _compare(name: str, mask: SparseMask, other: SparseMask, found: _Findings, what: str) -> None:
    if mask.shape != other.shape:
        found.add(name, f"has a mask of shape {tuple(mask.shape)} {what}, the mask file one of {tuple(other.shape)}")
    elif mask != other:
        different = int((mask.mask ^ other.mask).sum())
        found.add(name, f"has another mask {what} than in the mask file, at {different} of {mask.numel} positions")


def _mask_file(path: Path, given: Mapping[str, SparseMask] | None, found: _Findings) -> dict[str, SparseMask]:
    inside = read_masks(path)[0]
    for name, mask in inside.items():
        found.rows[name] = _row(name, mask.shape, torch.bool, "mask", mask, True)
    for name in {**inside, **(given or {})} if given is not None else ():
        if name in inside and name in (given or {}):
            _compare(name, inside[name], (given or {})[name], found, "here")
        else:
            found.add(name, f"is only in {'this file' if name in inside else 'the other mask file'}")
    return inside


def _checkpoint(path: Path, given: Mapping[str, SparseMask] | None, found: _Findings) -> dict[str, SparseMask]:
    """A checkpoint of ours: everything in it has a checksum, which is verified as it is read."""
    file = path / SINGLE if path.is_dir() else path
    tensors, header = read_safetensors(file)
    checkpoint = parse_checkpoint(tensors, header, file)
    masks = dict(checkpoint.masks)
    beside = _beside(path, given, found)
    for name, mask in beside.items():
        if name in masks:
            _compare(name, masks[name], mask, found, "in the checkpoint")
        masks.setdefault(name, mask)
    for name, weight in checkpoint.state.items():
        found.rows[name] = _row(name, weight.shape, weight.dtype, "dense", masks.get(name), True)
        found.add(name, *check_values(weight))
    for name, mask in masks.items():
        prefix = name.rpartition(".")[0]
        if f"{prefix}.{MODE_SETTINGS}".lstrip(".") in checkpoint.state:
            continue  # the layer holds θ where its mask prunes
        _against(name, checkpoint.state.get(name), mask, found)
    return masks


def _against(name: str, weight: Tensor | None, mask: SparseMask, found: _Findings) -> None:
    if weight is None:
        found.add(name, "has a mask, but no weight of that name is stored")
        return
    problems, minus = check_weight(weight, mask)
    found.add(name, *problems)
    if name in found.rows:
        found.rows[name]["minus_zeros"] = minus


def _beside(path: Path, given: Mapping[str, SparseMask] | None, found: _Findings) -> dict[str, SparseMask]:
    if given is not None:
        return dict(given)
    file = path / MASK_FILE
    if not path.is_dir() or not file.is_file():
        return {}
    try:
        return read_masks(file)[0]
    except FileFormatError as error:
        found.add(MASK_FILE, str(error))
        return {}


def _model(
    path: Path,
    given: Mapping[str, SparseMask] | None,
    found: _Findings,
    progress: Callable[[int, int, str], None] | None,
) -> dict[str, SparseMask]:
    stored = Stored.open(path)
    # A mask may have another name of a tied weight.
    masks = {stored.ties.get(name, name): mask for name, mask in _beside(path, given, found).items()}
    names = stored.names
    for done, name in enumerate(names, start=1):
        if progress is not None:
            progress(done, len(names), name)
        try:
            weight, own = stored.read(name)
        except FileFormatError as error:
            found.add(name, str(error))
            continue
        if own is not None and name in masks:
            _compare(name, own, masks[name], found, "in the layout")
        if own is not None:
            masks.setdefault(name, own)
        checked = all(part in stored.sums for part in stored.parts(name))
        found.rows[name] = _row(name, weight.shape, weight.dtype, stored.layout(name), masks.get(name), checked)
        found.add(name, *check_values(weight))
        if name in masks:
            _against(name, weight, masks[name], found)
    for name in masks:
        if name not in names:
            found.add(name, "has a mask, but no weight of that name is stored")
    found.notes += [f"{name}: is the same tensor as {owner}" for name, owner in stored.ties.items()]
    _heads(stored, found)
    _pruning_report(path, masks, found)
    return masks


def _heads(stored: Stored, found: _Findings) -> None:
    """A config that says the output head is the embedding, and two tensors that differ."""
    if not stored.config.get("tie_word_embeddings"):
        return
    heads = [name for name in stored.names if name.endswith(_HEADS)]
    tables = [name for name in stored.names if name.endswith(_EMBEDDINGS)]
    if len(heads) == 1 and len(tables) == 1:
        head, table = heads[0], tables[0]
        if stored.shape(head) != stored.shape(table) or not torch.equal(stored.read(head)[0], stored.read(table)[0]):
            found.add(head, f"should be the same tensor as {table} by the config (tie_word_embeddings), and differs")


def _pruning_report(path: Path, masks: Mapping[str, SparseMask], found: _Findings) -> None:
    file = path / REPORT_FILE
    if not path.is_dir() or not file.is_file():
        return
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        unread = not masks and any(violation["name"] == MASK_FILE for violation in found.violations)
        wrong = {} if unread else check_report(report, masks)  # told once, not once for each mask
    except (ValueError, AttributeError, TypeError) as error:
        found.add(REPORT_FILE, f"is damaged: {error}")
        return
    for name, problem in wrong.items():
        found.add(name, problem)


def _model_type(path: Path) -> str | None:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return str(config.get("model_type"))
    except (OSError, ValueError, AttributeError):
        return None


def _report(path: Path, kind: str, masks: Mapping[str, SparseMask], found: _Findings) -> dict[str, Any]:
    wrong = {violation["name"] for violation in found.violations}
    rows = [{**row, "ok": name not in wrong} for name, row in found.rows.items()]
    minus = {row["name"]: row["minus_zeros"] for row in rows if row["minus_zeros"]}
    notes = [f"{name}: {n} pruned positions hold -0.0, which is a zero" for name, n in minus.items()]
    numel, kept = sum(mask.numel for mask in masks.values()), sum(mask.n_active for mask in masks.values())
    return {
        "path": str(path),
        "kind": kind,
        "ok": not found.violations,
        "violations": found.violations,
        "notes": [*found.notes, *notes],
        "tensors": rows,
        "total": {
            "numel": numel,
            "kept": kept,
            "sparsity": (numel - kept) / numel if numel else 0.0,
            "masks": len(masks),
            "checksums": sum(row["checksum"] for row in rows),
        },
    }
