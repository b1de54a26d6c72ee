"""Prune a checkpoint larger than memory: read in shards, written in shards, continued where it was interrupted."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from resu.core.globs import glob_list
from resu.core.mask_stream import packed_bytes
from resu.core.pattern import Pattern
from resu.core.ranks import joined
from resu.core.shards import Shards
from resu.formats.bitmask import bitmask_prefixes
from resu.formats.compressed_config import sparsity_config, with_sparsity_config
from resu.formats.shards import LAYOUTS, is_packed, write_shard
from resu.formats.stored import read_config
from resu.integrations.carried import brought_masks
from resu.integrations.checkpoint_results import finish
from resu.integrations.checkpoint_state import Work, settings_of
from resu.integrations.folders import alone, check_free, put_in_place
from resu.pruning.allocation import Allocation
from resu.pruning.cuts import Reading, spread
from resu.pruning.mask_plan import MaskPlan, plan_masks
from resu.pruning.streaming import Progress, check_workers, counted_progress, stored_transposed

__all__ = ["prune_checkpoint"]


def prune_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    sparsity: float | Mapping[str, float] | None,
    method: str = "magnitude",
    *,
    pattern: Pattern | str | None = None,
    distribution: str | Allocation | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    transposed: str | Iterable[str] | None = None,
    layout: str = "dense",
    workers: int = 1,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Prune a checkpoint on disk into a new folder, in memory of a few chunks (or of one weight, see below).

    The new folder has the same files with the same tensors and +0.0 at pruned positions, the index, everything beside
    the weights (configuration, tokenizer, …), ``masks.safetensors`` and the report as ``pruning.json``. Weights that
    are not pruned now and that the source brings masks of keep these masks. The folder appears whole, at the end; until
    then the work lies in a hidden folder beside it, which an interruption leaves there and ``resume=True`` continues
    from the shards that are done, to the same bytes as without the interruption.

    What is pruned, how masks are decided and how much memory that takes is as in
    :func:`resu.pruning.streaming.compute_masks_for_state_dict`. Under ``torchrun`` (a file system that all processes
    see) layers are counted and shards are written by all processes; the files are those of a single process.

    Args:
        source: A folder of safetensors shards, or one safetensors file. It is not changed.
        out: The new folder; not inside ``source``.
        sparsity: Fraction removed, ``{glob: sparsity}``, or None with an N:M pattern.
        method: Name of a registered importance that needs weights only.
        pattern: As in ``compute_masks_for_state_dict``, and so the next five.
        distribution: How one sparsity is divided over layers.
        include: Globs.
        exclude: Globs.
        transposed: Globs of weights stored ``[in, out]``.
        seed: Of random scores.
        layout: ``"dense"`` (zeros are stored; anything loads it) or ``"bitmask"`` (matrices called "weight" as kept
            values and bits, the layout ``sparse-bitmask`` of compressed-tensors; other weights stay dense).
        workers: Threads.
        resume: Continue an interrupted run of the same settings; start one where there is none.
        overwrite: Whether an earlier result at ``out``, or an interrupted run, may be replaced.
        progress: ``progress(done, total, what)`` in weights.

    Returns:
        The report, plain JSON: ``method, pattern, distribution, sparsity`` as asked, ``actual`` (sparsity over pruned
        layers), ``total`` (over all parameters), ``layers``, ``skipped``, ``warnings``, ``seconds``, ``layout``.

    Raises:
        FileNotFoundError: If the source, one of its shards or the folder above ``out`` is not there.
        FileExistsError: If ``out`` or an interrupted run is there, and neither ``resume`` nor ``overwrite`` is given.
        ValueError: On a damaged file, NaN or infinite weights (the tensor is named), arguments that do not go
            together, or settings that differ from those of the run to resume (they are named). What this call has
            begun is removed.
        OSError: If the disk is full; what has been done stays for ``resume=True``.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"fc.weight": torch.randn(10, 10)}, f"{folder}/model.safetensors")
        ...     report = prune_checkpoint(f"{folder}/model.safetensors", f"{folder}/pruned", 0.7)
        ...     report["layers"][0]["kept"], sorted(p.name for p in Path(folder, "pruned").iterdir())
        (30, ['masks.safetensors', 'model.safetensors', 'pruning.json'])
    """
    began = time.perf_counter()
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be 'dense' or 'bitmask', got {layout!r}")
    check_workers(workers)
    source, target = Path(source), Path(os.path.realpath(out))
    shards = Shards.open(source)
    _check_places(shards, source, target)
    config = _config(source, layout)
    brought_masks(source)  # that they can be read is better known before a long work
    options: dict[str, Any] = {
        "sparsity": sparsity,
        "method": method,
        "pattern": pattern,
        "distribution": distribution,
        "include": glob_list(include),
        "exclude": glob_list(exclude),
        "transposed": stored_transposed(shards.names, transposed, shards.folder),
        "seed": seed,
    }
    settings = settings_of(shards, options, layout)
    with alone(target), joined() as ranks:
        work = Work(target.with_name(f".{target.name}.pruning"), ranks)
        found = work.state(settings, resume=resume, overwrite=overwrite)
        if found is None and resume and (report := _finished(target, settings)) is not None:
            return report
        check_free(target, overwrite=overwrite)
        tick = counted_progress(progress, sum(s.numel() for s in shards.shapes.values()), "counting")
        how = Reading(workers=workers, ranks=ranks, tick=tick)
        plan = plan_masks(shards, shards.shapes, **options, how=how, decide=found is None)
        ranks.barrier()  # nobody looks for an earlier run any more
        if found is None:
            work.begin(settings, plan.state())
        else:
            plan = plan.with_state(found["plan"])
        try:
            if not work.complete:
                _write(shards, plan, work, layout, workers, progress)
                ranks.barrier()
                if ranks.rank == 0:
                    finish(shards, plan, work, settings, source, config, began)
            if ranks.rank == 0:
                put_in_place(work.done(), target, overwrite=overwrite)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            text = f"the disk of {work.folder} is full; free some space and call again with resume=True"
            raise OSError(errno.ENOSPC, text) from error
        except ValueError:  # the source or the settings are to blame: there is nothing to continue
            if found is None:
                work.abandon()
            raise
        ranks.barrier()
        result: dict[str, Any] = json.loads((target / "pruning.json").read_text(encoding="utf-8"))
        return result


def _check_places(shards: Shards, source: Path, target: Path) -> None:
    folder = Path(os.path.realpath(shards.folder))
    inside = source.is_dir() and folder in target.parents
    if target == folder or inside or target in folder.parents:
        raise ValueError(
            f"out must not be the source ({folder}), inside or above it, got {target}; name another folder"
        )
    if packed := bitmask_prefixes(dict.fromkeys(shards.names)):
        raise ValueError(
            f"{source} holds weights in a bitmask layout ({packed[0]}weight), so it is pruned already; make it dense "
            f"first: resu export {source} --to dense --out DIR"
        )


def _config(source: Path, layout: str) -> dict[str, Any]:
    """``config.json``, checked to have room for the announcement of a layout."""
    config = read_config(source) if source.is_dir() else {}
    if layout == "bitmask":
        with_sparsity_config(config, sparsity_config("sparse-bitmask", [], pruned=0, numel=0))
    return config


def _finished(target: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report at ``target`` if it is what this call would make."""
    try:
        report: dict[str, Any] = json.loads((target / "pruning.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if report.get("settings") == settings else None


def _write(shards: Shards, plan: MaskPlan, work: Work, layout: str, workers: int, progress: Progress | None) -> None:
    """Write this process's share of the files that are not done."""
    left = [file for file in shards.files if not work.is_done(file)]
    by_file: dict[str, list[str]] = {file: [] for file in shards.files}
    for name in shards.names:
        by_file[shards.file_of(name)].append(name)
    costs = {file: sum(shards.nbytes(name) for name in by_file[file]) for file in left}
    if work.ranks.rank == 0:
        _check_room(shards, plan, work, layout, by_file, left)
    mine = work.ranks.mine(costs)
    tick = counted_progress(progress, sum(shards.shape(n).numel() for file in mine for n in by_file[file]), "writing")
    planned = set(plan.names)

    def one(file: str, threads: int) -> None:
        maskers = {name: _masker(plan, name) for name in by_file[file] if name in planned}
        target, bits = work.folder / file, work.bits(file)
        entries = write_shard(
            shards, file, target, maskers, bits, layout=layout, workers=threads, overwrite=True, tick=tick
        )
        work.mark(file, entries)

    if layout == "dense":
        for file in mine:
            one(file, workers)
    else:  # tensors of a file follow one another there, so files go side by side
        for _ in spread(lambda file: one(file, 1), mine, workers):
            pass


def _masker(plan: MaskPlan, name: str) -> Callable[[], Any]:
    return lambda: plan.masker(name)


def _check_room(
    shards: Shards, plan: MaskPlan, work: Work, layout: str, by_file: Mapping[str, list[str]], left: list[str]
) -> None:
    need = 0
    for name in (name for file in left for name in by_file[file]):
        entry, bits = shards.entries[name], 0
        size = entry.nbytes
        if name in plan.keeps:
            bits = packed_bytes(entry.shape)
            if is_packed(name, entry, layout):
                size = plan.keeps[name] * shards.dtype(name).itemsize + bits
        need += size + 2 * bits
    free = shutil.disk_usage(work.folder).free
    if need > free:
        raise OSError(
            errno.ENOSPC,
            f"{need / 1e9:.1f} GB are to be written to {work.folder.parent}, where {free / 1e9:.1f} GB are free",
        )
