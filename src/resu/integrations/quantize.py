"""Hugging Face model folders stored as 4-bit codes: the layout ``pack-quantized``, streamed weight by weight."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resu.core.globs import glob_list, glob_matches
from resu.core.io import FileFormatError
from resu.formats.pack_plan import plan_quantized
from resu.formats.pack_quantized import FORMAT
from resu.formats.relayout import plan_layout
from resu.formats.stored import Stored
from resu.integrations.convert import write_folder
from resu.integrations.folders import check_apart, check_free
from resu.integrations.hf import model_class, quiet
from resu.integrations.shrink.sizes import KEY
from resu.pruning.targets import pruning_targets

__all__ = ["linear_layers", "write_pack_quantized"]

_EXPERT = re.compile(r"\.experts\.\d+\.\w+\.weight$")
_ROUTERS = ("gate", "router", "shared_expert_gate")


def write_pack_quantized(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    group_size: int | None = None,
    ignore: str | Iterable[str] | None = None,
    masks: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Write a model folder with its linear layers as symmetric 4-bit codes, pruned weights exactly 0.

    The folder is one that transformers loads with compressed-tensors (0.15 or newer) installed, in the layout vLLM
    reads. Weights come one at a time, so the model may be larger than memory. Embeddings, the output head and what is
    tied to an embedding, norms, biases, and everything that is no ``nn.Linear`` in transformers stay as they are.
    Each weight is rounded to the nearest of 16 values; what that changes is in the report. Codes of a QRESU layer lie
    on another grid (with a zero point), so commit it first: its active weights are rounded a second time here.

    Args:
        source: A model folder: ``config.json`` and safetensors, dense or in any layout of this library.
        out: The folder to write.
        group_size: Columns that share a scale; it must divide the columns of every layer. None: one scale per row.
        ignore: Globs over names of weights or modules that stay dense too.
        masks: A mask file; None: ``masks.safetensors`` beside the weights, where there is one. It goes along, because
            kept weights that round to 0 cannot be told from pruned ones.
        overwrite: Whether an earlier result at ``out`` may be replaced.
        progress: Called with ``(done, total, name)``.

    Returns:
        The report of :func:`resu.integrations.convert.convert`, and ``group_size``, ``ignored`` (modules that stay
        dense), ``bits`` (per packed weight, scales included), ``error`` (``‖w - ŵ‖ / ‖w‖``: ``mean`` over layers,
        ``max``, ``worst``, the layer of the maximum).

    Raises:
        FileNotFoundError: If there is no folder, no ``config.json``, or no mask file.
        FileExistsError: If ``out`` holds something that may not be replaced.
        ValueError: If nothing is left to pack, a weight does not fit, the model is quantized already or has sizes of
            its own (``resu shrink``), a file is damaged, or a weight is not zero where its mask prunes.
        ImportError: If transformers is not installed.
    """
    source, out = Path(source), Path(out)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} is no model folder: it has no config.json, which says what its layers are")
    check_apart(out, source, masks)
    check_free(out, overwrite=overwrite)
    stored = Stored.open(source)
    if KEY in stored.config:
        raise ValueError(
            f"{source} has sizes that its architecture has no place for ({KEY} in config.json, by resu shrink), and "
            f"readers of {FORMAT} build models from the configuration alone; remove width and blocks only, not heads"
        )
    packed, left = linear_layers(source, stored, ignore)
    plan = plan_quantized(plan_layout(stored, source, "dense", masks), packed, left, group_size)
    report = write_folder(plan, source, out, overwrite=overwrite, progress=progress)
    weights = sum(stored.shape(name).numel() for name in packed)
    after = Stored.open(out)
    worst = max(plan.errors, key=lambda name: plan.errors[name])
    return {
        **report,
        "group_size": group_size,
        "ignored": left,
        "bits": 8 * sum(after.nbytes(name) for name in packed) / weights,
        "error": {
            "mean": sum(plan.errors.values()) / len(plan.errors),
            "max": plan.errors[worst],
            "worst": worst,
        },
    }


def linear_layers(
    folder: Path, stored: Stored, ignore: str | Iterable[str] | None = None
) -> tuple[list[str], list[str]]:
    """Which weights of a model folder belong to linear layers; the model is built without memory for weights.

    Args:
        folder: Holds ``config.json``.
        stored: The checkpoint in it.
        ignore: Globs of what to leave out; the output head and what is tied to an embedding are left out anyway.

    Returns:
        The names of weights as stored, and the names of all other ``nn.Linear`` modules of the model, which a reader
        has to be told. Experts that are stored one by one are linear layers to readers, although transformers fuses
        them, and all of them have to be packed; what routes tokens to them is left out.

    Raises:
        ValueError: If a glob matches nothing or an expert, or transformers does not have the model.
    """
    model, left_out = _empty_model(folder, stored), glob_list(ignore) or []
    targets, _ = pruning_targets(model, exclude=left_out or None)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    prefix = f"{model.base_model_prefix}."
    places = {name.removeprefix(prefix): name for name in stored.names}  # with or without it, it is the same weight
    found: dict[str, str] = {}
    for name, layer in targets.items():
        module = name.removesuffix(".weight")
        held = places.get(name.removeprefix(prefix))
        router = module.rpartition(".")[2] in _ROUTERS
        if module in modules and held is not None and stored.shape(held) == layer.weight.shape and not router:
            found[module] = held
    experts = {name for name in stored.names if _EXPERT.search(name) and len(stored.shape(name)) == 2}
    if odd := sorted(name for name in experts if any(glob_matches(glob, name) for glob in left_out)):
        raise ValueError(f"{odd[0]!r} cannot stay dense: readers of {FORMAT} fuse experts and want all of them packed")
    chosen = experts.union(found.values())
    return [name for name in stored.names if name in chosen], [name for name in modules if name not in found]


def _empty_model(folder: Path, stored: Stored) -> Any:
    from transformers import AutoConfig

    kind = model_class(stored.config, folder)
    try:
        with quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            return kind._from_config(config) if hasattr(kind, "_from_config") else kind.from_config(config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"the config.json of {folder} makes no model for {FORMAT}: {error}") from error
