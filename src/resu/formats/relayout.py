"""What becomes of each weight of a checkpoint when it is stored in another layout."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resu.core.mask import SparseMask
from resu.core.mask_files import read_masks
from resu.formats.bitmask import check_24, pack_compressed
from resu.formats.compressed_config import sparsity_config, with_sparsity_config, without_sparsity_config
from resu.formats.files import check_masked
from resu.formats.shards import is_packed
from resu.formats.stored import Stored

__all__ = ["MASK_FILE", "REPORT_FILE", "TARGETS", "Plan", "plan_layout"]

TARGETS = {"dense": "dense", "bitmask": "sparse-bitmask", "sparse-24": "sparse-24-bitmask"}
"""What a user calls a layout, and its name in a ``config.json``."""

# What pruning writes beside the weights of a model folder.
MASK_FILE = "masks.safetensors"
REPORT_FILE = "pruning.json"


@dataclass
class Plan:
    """What becomes of each weight.

    Attributes:
        stored: The checkpoint as it is.
        layout: ``"dense"``, ``"sparse-bitmask"`` or ``"sparse-24-bitmask"``.
        masks: ``{name: mask}`` of all pruned weights.
        metadata: Of the mask file they come from.
        packed: The weights that will be stored in that layout; the others stay dense.
    """

    stored: Stored
    layout: str
    masks: dict[str, SparseMask]
    metadata: dict[str, Any]
    packed: list[str] = field(default_factory=list)

    def names_of(self, file: str) -> list[str]:
        """The weights of one file, by where their values are."""
        shards = self.stored.shards

        def place(name: str) -> str:
            if name in self.stored.quantized:
                return shards.file_of(f"{self.stored.quantized[name]}weight_packed")
            return shards.file_of(f"{self.stored.packed[name]}compressed" if name in self.stored.packed else name)

        return [name for name in self.stored.names if place(name) == file]

    def parts(self, name: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The tensors a weight becomes."""
        dtype, shape = self.stored.dtype(name), tuple(self.stored.shape(name))
        if name not in self.packed:
            return {name: (dtype, shape)}
        prefix, kept = name.removesuffix("weight"), self.masks[name].n_active
        bits = (*shape[:-1], -(-shape[-1] // 8))
        if self.layout == "sparse-24-bitmask":
            parts = {
                "shape": (torch.int64, (len(shape), 1)),
                "compressed": (dtype, (shape[0], shape[1] // 2)),
                "bitmask": (torch.uint8, bits),
            }
        else:
            parts = {
                "shape": (torch.int64, (len(shape),)),
                "compressed": (dtype, (kept,)),
                "bitmask": (torch.uint8, bits),
                "row_offsets": (torch.int64, shape[:-1]),
            }
        return {prefix + part: what for part, what in parts.items()}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The values of :meth:`parts`, read and checked."""
        weight = self.dense(name)
        if name not in self.packed:
            return {name: weight}
        prefix = name.removesuffix("weight")
        parts = pack_compressed(weight, self.masks[name], self.layout)
        return {prefix + part: value for part, value in parts.items()}

    def dense(self, name: str) -> Tensor:
        """A weight as it is now, checked to be zero where its mask prunes; no -0.0 there."""
        weight, _ = self.stored.read(name)
        mask = self.masks.get(name)
        if mask is None:
            return weight
        check_masked(name, weight, mask)
        return mask.apply_(weight)

    def plain_config(self) -> dict[str, Any]:
        """``config.json`` without what it says of the layout the weights had."""
        config = without_sparsity_config(self.stored.config)
        if self.stored.quantized:
            config.pop("quantization_config", None)
        return config

    def config(self) -> dict[str, Any]:
        """``config.json`` of the result."""
        config = self.plain_config()
        if not self.packed:
            return config
        numel = sum(self.stored.shape(name).numel() for name in self.stored.names)
        pruned = sum(mask.n_pruned for mask in self.masks.values())
        return with_sparsity_config(config, sparsity_config(self.layout, self.packed, pruned=pruned, numel=numel))


def plan_layout(stored: Stored, source: Path, to: str, file: str | os.PathLike[str] | None) -> Plan:
    """What becomes of each weight of a checkpoint in the layout ``to``.

    Args:
        stored: The checkpoint.
        source: Where it is.
        to: A key of :data:`TARGETS`.
        file: A mask file; None: the masks of the layout it has, and of ``masks.safetensors`` beside it.

    Raises:
        FileNotFoundError: If there is no such mask file.
        ValueError: If there are no masks for a sparse layout, they do not fit the weights or the layout, or two of
            them disagree.
    """
    beside = source / MASK_FILE
    found: dict[str, SparseMask] = {}
    metadata: dict[str, Any] = {}
    if file is not None or (source.is_dir() and beside.is_file()):
        found, body = read_masks(file if file is not None else beside)
        metadata = body["metadata"]
    masks: dict[str, SparseMask] = {}
    for given, mask in found.items():
        name = stored.ties.get(given, given)
        if masks.setdefault(name, mask) != mask:
            raise ValueError(f"{given!r} and {name!r} are one tensor, but their masks differ")
    for name in stored.packed:
        own = stored.read_mask(name)
        if masks.setdefault(name, own) != own:
            raise ValueError(f"{name!r} is stored with another mask than {file or beside} gives")
    names = set(stored.names)
    for name, mask in masks.items():
        if name not in names:
            raise ValueError(f"mask {name!r} belongs to no tensor of {source}; is it of another model?")
        if mask.shape != stored.shape(name):
            raise ValueError(f"mask {name!r} has shape {tuple(mask.shape)}, the weight {tuple(stored.shape(name))}")
    plan = Plan(stored, TARGETS[to], masks, metadata)
    if to != "dense":
        _choose(plan, source, to)
    return plan


def _choose(plan: Plan, source: Path, to: str) -> None:
    """Which weights are stored sparse; the others with a mask stay dense."""
    if not plan.masks:
        raise ValueError(
            f"{source} has no masks, so nothing says which weights are kept; name a mask file (--masks). A mask is not "
            "guessed from zeros: where they are all pruned weights, write them down with "
            "save_mask({name: weight != 0}, file)"
        )
    entries, matrices = plan.stored.shards.entries, {*plan.stored.packed, *plan.stored.quantized}
    odd = []
    for name, mask in plan.masks.items():
        if name not in matrices and not is_packed(name, entries[name], "bitmask"):
            continue
        if to == "sparse-24":
            try:
                check_24(mask)
            except ValueError as error:
                odd.append(f"{name} ({error})")
                continue
        plan.packed.append(name)
    if odd:
        raise ValueError(
            f"{len(odd)} of {len(plan.masks)} masks are not 2:4: {'; '.join(odd[:3])}{'; …' if len(odd) > 3 else ''}. "
            "Convert to bitmask instead"
        )
