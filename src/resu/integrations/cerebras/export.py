"""Pruned models on their way to Cerebras: masks as zeros of the weights, or as tensors of the checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resu.core.io import replacing
from resu.core.mask import SparseMask
from resu.formats.relayout import Plan, plan_layout
from resu.formats.stored import Stored
from resu.integrations.cerebras.config import sparsity_block
from resu.integrations.convert import write_folder
from resu.integrations.folders import check_apart, check_free

__all__ = ["CHECKPOINT", "KINDS", "mask_tensors", "write_cerebras", "write_checkpoint"]

KINDS = ("zeros", "tensors")
CHECKPOINT = "checkpoint_0.mdl"
CONFIG = "sparsity.yaml"


def write_cerebras(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    masks: str | os.PathLike[str] | None = None,
    kind: str = "zeros",
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Write a pruned model folder so that Cerebras' trainer knows what is pruned.

    ``kind="zeros"``: a folder as ``resu export --to dense`` writes it, for ModelZoo's ``convert_checkpoint`` tool,
    which renames weights and carries zeros along; Cerebras' ``init_method: from_zeros`` then takes every 0 for pruned.
    A kept weight that is 0 would be lost by that (one in a matrix without a mask too), so it is written as the smallest
    normal number of its dtype (1.2e-38 in bfloat16), and the report says how many there were. Embeddings, which
    Cerebras leaves dense, stay as they are.

    ``kind="tensors"``: beside that folder's files ``checkpoint_0.mdl``, a checkpoint ``{"model": weights and
    <parameter>_mask}`` with bool masks that ``cerebras.pytorch`` reads, under the names the weights have in ``source``:
    for models of one's own, whose names are those of the Cerebras model. It is made in memory.

    ``sparsity.yaml`` holds the blocks ``trainer.init.sparsity`` and ``trainer.init.checkpoint`` to put into a run's
    configuration, and ``masks.safetensors`` the masks, for ``SparseMaskCallback``.

    Args:
        source: A model folder, in any layout of this library.
        out: The folder to write.
        masks: A mask file; None: those of the layout, and of ``masks.safetensors`` beside the weights.
        kind: ``"zeros"`` or ``"tensors"``.
        overwrite: Whether an earlier result at ``out`` may be replaced.
        progress: Called with ``(done, total, name)``.

    Returns:
        The report of :func:`resu.integrations.convert.convert`, with ``layout`` ``"cerebras"``, ``kept_zeros`` and
        ``yaml``.

    Raises:
        FileNotFoundError: If there is nothing at ``source`` or ``masks``.
        FileExistsError: If ``out`` holds something that may not be replaced.
        ValueError: If ``kind`` is not known, there are no masks, or they do not fit the weights.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")
    source, out = Path(source), Path(out)
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is no model folder")
    check_apart(out, source, masks)
    check_free(out, overwrite=overwrite)
    stored = Stored.open(source)
    dense = plan_layout(stored, source, "dense", masks)
    if not dense.masks:
        raise ValueError(f"{source} has no masks, so nothing says which weights are pruned; name a mask file (--masks)")
    plan = _Zeros(stored, "dense", dense.masks, dense.metadata)
    pruned = sum(mask.n_pruned for mask in plan.masks.values()) / sum(mask.numel for mask in plan.masks.values())

    def more(folder: Path) -> None:
        names = list(plan.masks) if kind == "tensors" else None
        (folder / CONFIG).write_text(_yaml(pruned, names), encoding="utf-8")
        if kind == "tensors":
            written = Stored.open(folder)
            write_checkpoint({name: written.read(name)[0] for name in written.names}, plan.masks, folder / CHECKPOINT)

    report = write_folder(plan, source, out, overwrite=overwrite, progress=progress, more=more)
    return {**report, "layout": "cerebras", "kept_zeros": plan.kept_zeros, "yaml": str(out / CONFIG)}


def mask_tensors(masks: Mapping[str, SparseMask | Tensor]) -> dict[str, Tensor]:
    """Masks as ``cerebras.pytorch`` has them in a model's state: ``{"<parameter>_mask": bool tensor}``, True = kept.

    Example:
        >>> mask_tensors({"fc.weight": SparseMask(torch.tensor([[True, False]]))})
        {'fc.weight_mask': tensor([[ True, False]])}
    """
    return {f"{name}_mask": mask.mask if isinstance(mask, SparseMask) else mask for name, mask in masks.items()}


def write_checkpoint(
    state: Mapping[str, Tensor],
    masks: Mapping[str, SparseMask | Tensor],
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> None:
    """A checkpoint that ``cerebras.pytorch.load`` reads, with the masks among the model's tensors.

    Args:
        state: The model's state, under the names it has on Cerebras.
        masks: ``{parameter name: mask}``.
        path: The file.
        overwrite: Whether a file that is there may be replaced.

    Raises:
        FileExistsError: If a file is there and ``overwrite`` is False.
        ValueError: If a mask fits no tensor of the state.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     state = {"fc.weight": torch.tensor([[1.0, 0.0]])}
        ...     write_checkpoint(state, {"fc.weight": torch.tensor([[True, False]])}, f"{folder}/c.mdl")
        ...     sorted(torch.load(f"{folder}/c.mdl", weights_only=True)["model"])
        ['fc.weight', 'fc.weight_mask']
    """
    tensors = mask_tensors(masks)
    for name, mask in masks.items():
        if name not in state or tuple(state[name].shape) != tuple(mask.shape):
            found = tuple(state[name].shape) if name in state else "nothing"
            raise ValueError(f"mask {name!r} has shape {tuple(mask.shape)}, the state has {found} of that name")
    with replacing(path, overwrite=overwrite) as temporary:
        torch.save({"model": {**state, **tensors}}, temporary)


def _yaml(sparsity: float, names: list[str] | None) -> str:
    """The blocks of a run's configuration that use exported masks, as YAML (JSON values are YAML)."""
    init: dict[str, dict[str, Any]] = {"sparsity": sparsity_block(sparsity, names)}
    if names is None:  # the masks come of the zeros, and the trainer would miss them in the checkpoint
        init["checkpoint"] = {"disable_strict_checkpoint_loading": True}
    lines = ["# To be put into the configuration of a run.", "trainer:", "  init:"]
    for block, values in init.items():
        lines += [f"    {block}:", *(f"      {key}: {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


@dataclass
class _Zeros(Plan):
    """The dense layout, in which a 0 is a pruned weight and nothing else."""

    kept_zeros: int = 0

    def tensors(self, name: str) -> dict[str, Tensor]:
        weight, mask = self.dense(name), self.masks.get(name)
        if not weight.is_floating_point() or (mask is None and (weight.ndim < 2 or "embed" in name)):
            return {name: weight}
        lost = weight == 0
        if mask is not None:
            lost &= mask.mask
        self.kept_zeros += int(lost.sum())
        return {name: weight.masked_fill_(lost, torch.finfo(weight.dtype).smallest_normal)}
