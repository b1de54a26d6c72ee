"""What ``prune_checkpoint`` writes beside the shards: masks, index, configuration, report."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resu.core.io import replacing
from resu.core.mask_files import mask_entries
from resu.core.mask_stream import join_masks
from resu.core.pattern import NM
from resu.core.shards import INDEX, Shards
from resu.formats.compressed_config import sparsity_config, with_sparsity_config
from resu.formats.shards import is_packed
from resu.integrations.carried import KEPT, carried_masks, sparser_before
from resu.integrations.checkpoint_state import Work
from resu.integrations.folders import copy_companions
from resu.pruning.mask_plan import MaskPlan

__all__ = ["finish"]

_CARRIED = ".carried"  # no file of a checkpoint is hidden


def _report(shards: Shards, plan: MaskPlan, work: Work, settings: Mapping[str, Any]) -> dict[str, Any]:
    stated = settings["options"]
    layout = stated["layout"]
    entries = work.entries(shards.files)
    layers = []
    for name in plan.names:
        numel, kept = shards.shape(name).numel(), entries[name]["kept"]
        layers.append(
            {
                "name": name,
                "shape": list(shards.shape(name)),
                "kept": kept,
                "numel": numel,
                "sparsity": (numel - kept) / numel,
            }
        )
    numel, kept = sum(layer["numel"] for layer in layers), sum(layer["kept"] for layer in layers)
    every = sum(shape.numel() for shape in shards.shapes.values())
    dense = [n for n in plan.names if not is_packed(n, shards.entries[n], layout)] if layout == "bitmask" else []
    return {
        "method": stated["method"],
        "pattern": str(plan.pattern),
        "distribution": stated["distribution"],
        "sparsity": plan.pattern.sparsity if isinstance(plan.pattern, NM) else stated["sparsity"],
        "refine": None,
        "update": None,
        "layout": layout,
        "actual": (numel - kept) / numel,
        "total": (numel - kept) / every,
        "layers": layers,
        "skipped": dict(plan.skipped),
        "warnings": [f"{n!r} is stored densely: the bitmask layout is for matrices called 'weight'" for n in dense],
        "settings": dict(settings),
    }


def finish(
    shards: Shards,
    plan: MaskPlan,
    work: Work,
    settings: Mapping[str, Any],
    source: Path,
    config: Mapping[str, Any],
    began: float,
) -> None:
    """Write what comes after the shards: masks, index, what lies beside the weights, configuration; the report last."""
    layout = settings["options"]["layout"]
    report = _report(shards, plan, work, settings)
    carried = _carry(shards, plan, work, source)
    _tell_carried(report, carried, sum(shape.numel() for shape in shards.shapes.values()))
    report["warnings"] += sparser_before(source, {layer["name"]: layer["kept"] for layer in report["layers"]})
    parts = [(work.bits(file), work.entries([file])) for file in shards.files] + [(work.bits(_CARRIED), carried)]
    join_masks(parts, work.folder / "masks.safetensors", overwrite=True)
    places = {
        name: entry.file for file in shards.files for name, entry in Shards.open(work.folder / file).entries.items()
    }
    size = sum(entry.nbytes for file in shards.files for entry in Shards.open(work.folder / file).entries.values())
    if shards.index is not None:
        metadata = {**(shards.index.get("metadata") or {}), "total_size": size}
        _json(work.folder / INDEX, {**shards.index, "metadata": metadata, "weight_map": places})
    if layout == "bitmask":
        packed = [name for name in plan.names if is_packed(name, shards.entries[name], layout)]
        pruned = sum(layer["numel"] - layer["kept"] for layer in report["layers"])
        numel = sum(shape.numel() for shape in shards.shapes.values())
        block = sparsity_config("sparse-bitmask", packed, pruned=pruned, numel=numel)
        _json(work.folder / "config.json", with_sparsity_config(config, block))
    left_out = copy_companions(source, work.folder) if source.is_dir() else []
    report["warnings"] += [f"{file} was not copied: it holds unpruned weights" for file in left_out]
    report["seconds"] = round(time.perf_counter() - began, 3)
    _json(work.folder / "pruning.json", report)


def _carry(shards: Shards, plan: MaskPlan, work: Work, source: Path) -> dict[str, Any]:
    """Bits of the masks that the source has of weights which are not pruned now; what the header says of them."""
    found: dict[str, Any] = {}
    with open(work.bits(_CARRIED), "wb") as file:
        for name, mask in carried_masks(source, shards.shapes, set(plan.names)):
            file.write(mask.packed.numpy().tobytes())
            found |= mask_entries({name: mask})
    return found


def _tell_carried(report: dict[str, Any], carried: Mapping[str, Mapping[str, Any]], every: int) -> None:
    for name, entry in carried.items():
        report["skipped"][name] = report["skipped"].get(name, "left as it is") + KEPT
        report["total"] += (math.prod(entry["shape"]) - entry["kept"]) / every


def _json(path: Path, body: Mapping[str, Any]) -> None:
    with replacing(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
