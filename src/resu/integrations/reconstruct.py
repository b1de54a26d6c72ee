"""A pruned Hugging Face directory repaired into a new one, block by block from disk: what ``resu reconstruct`` does."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resu.core.io import write_all
from resu.core.mask import SparseMask
from resu.core.mask_files import read_masks
from resu.core.shards import INDEX, Shards
from resu.formats.bitmask import bitmask_prefixes
from resu.integrations.folders import alone, check_apart, check_free, copy_companions, new_folder
from resu.integrations.hf import load_tokenizer
from resu.integrations.hf_empty import empty_model
from resu.integrations.hf_prune import model_batches
from resu.integrations.hf_save import seal_folder
from resu.pruning.layerwise import Walk
from resu.pruning.lending import Lending
from resu.pruning.placement import outer_items
from resu.pruning.reconstruction import masked_layers, reader, run_reconstruction, stored_names
from resu.pruning.reconstruction_run import Plan, Run
from resu.pruning.spill import Spill

__all__ = ["reconstruct_directory"]

_MASKS, _REPORT = "masks.safetensors", "pruning.json"
_LARGE = 1 << 30  # bytes of activations at one place of the model from which on they wait in files


def reconstruct_directory(
    pruned: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dense: str | os.PathLike[str],
    calibration: str | os.PathLike[str],
    masks: str | os.PathLike[str] | None = None,
    samples: int = 128,
    length: int | None = None,
    batch_size: int = 8,
    blocks: str | Iterable[str] | None = None,
    device: torch.device | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
    **plan: Any,
) -> dict[str, Any]:
    """Repair a pruned model directory into a new one, in memory of two blocks and the activations.

    The model is built without weights; those outside of blocks are read once, a block's while it runs, from the
    pruned and from the dense directory. So a model larger than memory is repaired on a small machine. Activations that
    are large wait in memory-mapped files. Else as :func:`resu.pruning.reconstruction.reconstruct`, to the same bits.

    What is done lies in a hidden folder beside ``out`` until the end (repaired blocks, and the activations of the last
    one), from where ``resume=True`` goes on after an interrupt.

    Args:
        pruned: A Hugging Face directory in the dense layout, as ``resu prune`` writes it.
        out: The folder to write; the one above it must exist.
        dense: The directory it was pruned from.
        calibration: A text (:func:`resu.integrations.hf_text.read_texts`).
        masks: A mask file; None: ``masks.safetensors`` of ``pruned``. Masks are never read off the zeros.
        samples: Calibration samples.
        length: Tokens per sample; None: what the model was made for, at most 2048.
        batch_size: Samples per step, fewer where they are long.
        blocks: As in ``reconstruct``.
        device: Where to compute; None: the CPU.
        resume: Go on with an interrupted run of the same settings, or begin one.
        overwrite: Whether an earlier result in ``out``, or an interrupted run, may be replaced.
        progress: Called with (done, total, what).
        plan: ``train, targets, epochs, lr, rank, alpha, held_out, seed`` of ``reconstruct``.

    Returns:
        The report, as ``pruning.json`` of the new folder: that of ``pruned`` with ``reconstruction``, the report of
        ``reconstruct``. Masks are copied. After ``train="theta"`` the model is dense, and there are no masks beside it.

    Raises:
        FileNotFoundError: If a directory, the masks or the text are missing.
        FileExistsError: If ``out`` or an interrupted run is there, and neither ``resume`` nor ``overwrite`` is given.
        ValueError: On impossible settings, a bitmask layout, files whose weights cannot be read one by one, or a text
            that is too short.
    """
    settings = Plan(**plan)
    pruned, dense, target = Path(pruned), Path(dense), Path(os.path.realpath(out))
    check_apart(out, pruned, dense, calibration, masks)
    check_free(out, overwrite=overwrite)
    shards, teacher = (Shards.open(folder) for folder in (pruned, dense))
    for folder in (shards, teacher):
        if packed := bitmask_prefixes(dict.fromkeys(folder.names)):
            raise ValueError(
                f"{folder.folder} holds weights in a bitmask layout ({packed[0]}weight); make it dense first "
                "(resu convert)"
            )
    model = empty_model(pruned)
    given = _masks(Path(masks) if masks is not None else pruned / _MASKS, model, shards)
    layers, held = masked_layers(model, given)
    tokenizer = load_tokenizer(pruned) or load_tokenizer(dense)
    batches = model_batches(model, tokenizer, calibration, samples, length, settings.seed, most=batch_size)
    with alone(target):
        notes = target.with_name(f".{target.name}.reconstructing")
        if notes.exists() and not resume:
            if not overwrite:
                raise FileExistsError(
                    f"an interrupted run is in {notes}; pass resume=True to continue it, or overwrite=True to begin "
                    "again"
                )
            shutil.rmtree(notes)
        begun = not notes.exists()
        notes.mkdir(exist_ok=True)
        try:
            own = reader(model, pruned)
            names = {tie: layer.name for layer in layers.values() for tie in (layer.name, *layer.ties)}
            run: Run | None = None

            def latest(name: str) -> Tensor | None:
                done = None if run is None or run.folder is None else run.folder.weight(names.get(name, name))
                return own(name) if done is None else done

            items = outer_items(model)
            lent = Lending(model, items, reader(model, dense, layers)), Lending(model, items, latest)
            run = Run(layers, held, settings, *lent, progress)
            globs = blocks if blocks is None or isinstance(blocks, str) else list(blocks)
            store = Spill(notes, least=_LARGE // len(batches))
            walk = Walk(model, layers, batches, blocks=globs, device=device, store=store)
            identity = {"blocks": globs, "pruned": _files(shards), "dense": _files(teacher)}
            result = run_reconstruction(run, walk, notes, identity, streamed=True)
            stored = stored_names(model, shards.entries)
            report = _report(pruned, {stored[name]: mask for name, mask in given.items()}, result.report)
            with new_folder(target, overwrite=overwrite) as temporary:
                _write(shards, run, stored, temporary)
                report["warnings"] += [
                    f"{file} was not copied: it holds unrepaired weights" for file in copy_companions(pruned, temporary)
                ]
                if settings.train != "theta":
                    shutil.copyfile(masks if masks is not None else pruned / _MASKS, temporary / _MASKS)
                text = json.dumps(report, indent=2, ensure_ascii=False)
                (temporary / _REPORT).write_text(text + "\n", encoding="utf-8")
        except ValueError:
            if begun:  # the source or the settings are to blame: there is nothing to continue
                shutil.rmtree(notes, ignore_errors=True)
            raise
        shutil.rmtree(notes, ignore_errors=True)
        return report


def _masks(file: Path, model: Any, shards: Shards) -> dict[str, SparseMask]:
    """Masks by the names of the model's parameters."""
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no mask file {file}; name the one the model was pruned with (a mask is never read off the zeros)"
        )
    found = read_masks(file)[0]
    named = {stored: name for name, stored in stored_names(model, shards.entries).items()}
    if unknown := [name for name in found if name not in named]:
        raise ValueError(f"{file} has a mask of {unknown[0]!r}, which {shards.folder} has not")
    return {named[name]: mask for name, mask in found.items()}


def _files(shards: Shards) -> dict[str, list[int]]:
    """By what files are known again: bytes and the time of the last change."""
    status = {file: (shards.folder / file).stat() for file in shards.files}
    return {file: [one.st_size, one.st_mtime_ns] for file, one in status.items()}


def _write(shards: Shards, run: Run, stored: Mapping[str, str], folder: Path) -> None:
    """The files of the pruned model with repaired weights in their places; one weight in memory at a time."""
    for file in shards.files:
        shutil.copyfile(shards.folder / file, folder / file)
    if shards.index is not None:
        shutil.copyfile(shards.folder / INDEX, folder / INDEX)
    assert run.folder is not None
    for block in run.blocks:
        for name in block["layers"] if block["epoch"] else ():
            known = next(n for n in (name, *run.layers[name].ties) if n in stored)
            entry, weight = shards.entries[stored[known]], run.folder.weight(name)
            assert weight is not None
            data = weight.to(shards.dtype(stored[known])).contiguous().view(-1).view(torch.uint8)
            with open(folder / entry.file, "r+b", buffering=0) as opened:
                opened.seek(entry.start)
                write_all(opened, data.numpy().data)
    seal_folder(folder)


def _report(pruned: Path, masks: Mapping[str, SparseMask], reconstruction: dict[str, Any]) -> dict[str, Any]:
    file = pruned / _REPORT
    before: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    dense = reconstruction["train"] == "theta"
    if dense:  # nothing is pruned any more
        before = {**before, "sparsity": 0.0, "total": 0.0} | ({"pattern": None} if "pattern" in before else {})
    layers = [
        {
            "name": name,
            "shape": list(mask.shape),
            "kept": mask.n_active,
            "numel": mask.numel,
            "sparsity": mask.sparsity,
        }
        for name, mask in ({} if dense else masks).items()
    ]
    known = {row["name"]: row for row in before.get("layers", [])}
    # Of what is said of a layer, only its errors are no longer true.
    rows = [{**{k: v for k, v in known.get(r["name"], {}).items() if not k.startswith("error")}, **r} for r in layers]
    return {
        **before,
        "actual": reconstruction["actual"],
        "layers": rows,
        "warnings": list(before.get("warnings", [])),
        "source": str(pruned),
        "reconstruction": reconstruction,
    }
