"""Model folders in the sparse layouts of compressed-tensors, which that library gave up after 0.14."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from resu.core.io import replacing, tensor_checksum
from resu.core.mask import SparseMask
from resu.core.mask_files import write_safetensors
from resu.core.shards import SINGLE
from resu.formats.bitmask import pack_compressed
from resu.formats.compressed_config import LAYOUTS, find_sparsity_config, sparsity_config, with_sparsity_config
from resu.formats.files import check_masked, plain_tensors, separate
from resu.formats.stored import Stored, seal_shard

__all__ = ["read_compressed", "write_compressed"]


def read_compressed(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Tensor], dict[str, SparseMask], dict[str, Any] | None]:
    """A model in ``sparse-bitmask`` or ``sparse-24-bitmask``, by whichever library, as dense weights and masks.

    Args:
        path: A model folder (one file, or shards with their index), or one safetensors file.

    Returns:
        ``(state, masks, block)``: all weights dense, with +0.0 where they are pruned; the masks of those stored in a
        sparse layout; ``sparsity_config`` from ``config.json`` as it stands there, or None.

    Raises:
        FileNotFoundError: If there is nothing, or a shard is missing.
        ValueError: If a file is truncated or damaged (the tensor is named where it can be), or is a pickle.
    """
    stored = Stored.open(path)
    state: dict[str, Tensor] = {}
    masks: dict[str, SparseMask] = {}
    for name in stored.names:
        state[name], mask = stored.read(name)
        if mask is not None:
            masks[name] = mask
    state |= {alias: state[owner] for alias, owner in stored.ties.items()}
    return state, masks, find_sparsity_config(stored.config)


def write_compressed(
    state: Mapping[str, Tensor],
    masks: Mapping[str, Tensor | SparseMask],
    folder: str | os.PathLike[str],
    *,
    layout: str = "sparse-bitmask",
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model as ``model.safetensors`` and ``config.json`` that compressed-tensors 0.14 reads.

    Each of the two files is written whole or not at all. Tensors that are tied are stored once, as Transformers does.

    Args:
        state: ``{name: tensor}``.
        masks: ``{name: mask}`` of the weights to store sparse; kept zeros are stored.
        folder: Where; made if it is not there.
        layout: ``"sparse-bitmask"`` or ``"sparse-24-bitmask"`` (masks that keep exactly 2 of each 4).
        config: What else ``config.json`` shall say.
        overwrite: Whether files that are there may be replaced.

    Raises:
        FileExistsError: If one of the files is there and ``overwrite`` is False; nothing has been written then.
        ValueError: If a mask fits no weight or not the layout, or a weight is not zero where its mask prunes.
        TypeError: If a mask is not bool.
        OSError: If a file cannot be written; what was there before is whole.

    Example:
        >>> import tempfile, torch
        >>> keep = torch.tensor([[True, False, True, False]])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     state = {"fc.weight": torch.tensor([[1.0, 0.0, 0.0, 0.0]])}
        ...     write_compressed(state, {"fc.weight": keep}, folder, layout="sparse-24-bitmask")
        ...     _, masks, block = read_compressed(folder)
        ...     masks["fc.weight"].mask, block["format"]
        (tensor([[ True, False,  True, False]]), 'sparse-24-bitmask')
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not known; known: {', '.join(LAYOUTS)}")
    tensors, ties = plain_tensors(state)
    numel = sum(tensor.numel() for tensor in tensors.values())
    packed: dict[str, SparseMask] = {}
    for given, mask in masks.items():
        name = ties.get(given, given)
        mask = mask if isinstance(mask, SparseMask) else SparseMask(mask)
        if name in packed:
            if packed[name] != mask:
                raise ValueError(f"{given!r} and {name!r} are one tensor, but their masks differ")
            continue
        packed[name] = mask
        check_masked(given, tensors.get(name), mask)
        tensors |= _parts(name, tensors.pop(name), packed[name], layout)
    tensors = separate(tensors)
    pruned = sum(mask.n_pruned for mask in packed.values())
    block = sparsity_config(layout, packed, pruned=pruned, numel=numel)
    text = json.dumps(with_sparsity_config(config or {}, block), indent=2, allow_nan=False)
    header = seal_shard({name: tensor_checksum(tensor) for name, tensor in tensors.items()}, ties)
    _write(Path(folder), tensors, header, text, overwrite)


def _parts(name: str, weight: Tensor, mask: SparseMask, layout: str) -> dict[str, Tensor]:
    prefix = name.removesuffix("weight")
    if name.rpartition(".")[2] != "weight":
        raise ValueError(
            f"{layout} stores parameters called 'weight', not {name!r}; leave its mask out: it stays dense"
        )
    try:
        parts = pack_compressed(weight, mask, layout)
    except ValueError as error:
        raise ValueError(f"mask {name!r} does not fit {layout}: {error}") from None
    return {prefix + part: value for part, value in parts.items()}


def _write(
    folder: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], config: str, overwrite: bool
) -> None:
    for file in (SINGLE, "config.json"):
        if (folder / file).exists() and not overwrite:
            raise FileExistsError(f"{folder / file} is there already; pass overwrite=True to replace it")
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / SINGLE, overwrite=overwrite) as temporary:
        write_safetensors(tensors, temporary, header)
    with replacing(folder / "config.json", overwrite=overwrite) as temporary:
        temporary.write_text(config + "\n", encoding="utf-8")
