"""A checkpoint on disk as its weights, one at a time, in whichever layout each of them is stored."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import resu
from resu.core.io import FileFormatError, open_header, seal_header, tensor_checksum
from resu.core.mask import SparseMask
from resu.core.shards import Shards
from resu.formats.bitmask import PARTS, bitmask_prefixes, mask_from_bits, unpack_bitmask
from resu.formats.compressed_config import find_sparsity_config
from resu.formats.pack_quantized import FORMAT, quantized_prefixes, unpack_quantized
from resu.formats.pack_quantized import PARTS as QUANTIZED_PARTS

__all__ = ["SHARD_HEADER", "Stored", "read_config", "seal_shard"]

SHARD_HEADER = "resu_shard"
_VERSION = 1


def seal_shard(sums: Mapping[str, str], ties: Mapping[str, str] | None = None) -> dict[str, str]:
    """Metadata of one safetensors file of a model folder: checksums of its tensors, and names that are ties.

    Args:
        sums: ``{tensor name: checksum}`` by :func:`resu.core.io.tensor_checksum`.
        ties: ``{name that is not stored: the name it is the same tensor as}``.
    """
    body = {"version": _VERSION, "library": resu.__version__, "sha256": dict(sums), "ties": dict(ties or {})}
    return {"format": "pt", **seal_header(SHARD_HEADER, body)}


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """``config.json`` of a model folder; empty where there is none.

    Raises:
        FileFormatError: If it is no JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(f"{path} is damaged: {error}") from None
    if not isinstance(config, dict):
        raise FileFormatError(f"{path} must hold a JSON object, it holds a {type(config).__name__}")
    return config


@dataclass(frozen=True)
class Stored:
    """The weights of a checkpoint by name; nothing is read until it is asked for.

    Attributes:
        shards: The files.
        packed: ``{weight name: prefix of its parts}`` of weights in a bitmask layout.
        quantized: The same of weights in the layout ``pack-quantized``.
        sums: ``{tensor name: checksum}``, where the files have them.
        ties: ``{name that is not stored: the name it is the same tensor as}``, where the files say so.
        config: ``config.json``, empty for a single file or where there is none.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> from resu.formats.bitmask import pack_compressed
        >>> mask = SparseMask(torch.tensor([[True, False]]))
        >>> parts = pack_compressed(torch.tensor([[3.0, 0.0]]), mask)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({f"fc.{part}": value for part, value in parts.items()}, f"{folder}/model.safetensors")
        ...     stored = Stored.open(folder)
        ...     stored.names, stored.read("fc.weight")[0]
        (['fc.weight'], tensor([[3., 0.]]))
    """

    shards: Shards
    packed: Mapping[str, str] = field(default_factory=dict)
    sums: Mapping[str, str] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    quantized: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Stored:
        """The checkpoint at ``path``: a model folder, or one safetensors file.

        Raises:
            FileNotFoundError: If there is nothing, or a shard is missing.
            ValueError: If a file is damaged, is a pickle, or the headers disagree with the tensors.
        """
        shards = Shards.open(path)
        names = dict.fromkeys(shards.names)
        packed = {f"{prefix}weight": prefix for prefix in bitmask_prefixes(names)}
        quantized = {f"{prefix}weight": prefix for prefix in quantized_prefixes(names)}
        if both := sorted(name for name in packed if name in names):
            raise FileFormatError(f"{path} holds {both[0]!r} both dense and in a bitmask layout")
        if both := sorted(name for name in quantized if name in names or name in packed):
            raise FileFormatError(f"{path} holds {both[0]!r} both in the layout {FORMAT} and in another")
        others = (f"{prefix}{part}" for prefix in quantized.values() for part in ("weight_zero_point", "weight_g_idx"))
        if odd := [name for name in others if name in names]:
            raise FileFormatError(f"{path} holds {odd[0]!r}: of {FORMAT}, only symmetric codes in their order are read")
        for name in names:
            prefix, dot, part = name.rpartition(".")
            beside = [f"{prefix}{dot}{other}" for other in ("bitmask", "shape")]
            if part == "compressed" and sum(other in names for other in beside) == 1:
                raise FileFormatError(f"{path} is damaged: {name!r} has no {' or no '.join(beside)} beside it")
        sums, ties = _sealed(shards, path)
        config = read_config(path) if Path(path).is_dir() else {}
        found = cls(shards, packed, sums, ties, config, quantized)
        block = find_sparsity_config(config)
        if block and str(block.get("format", "dense")) != "dense" and not packed:
            raise FileFormatError(f"{path}: the config announces {block['format']!r}, but no weight is stored so")
        return found

    @property
    def names(self) -> list[str]:
        """All weights that are stored, in the order of the files."""
        parts = {prefix + part for prefix in self.packed.values() for part in PARTS}
        parts |= {prefix + part for prefix in self.quantized.values() for part in QUANTIZED_PARTS}
        first = {prefix + "compressed": name for name, prefix in self.packed.items()}
        first |= {prefix + "weight_packed": name for name, prefix in self.quantized.items()}
        return [first.get(name, name) for name in self.shards.names if name in first or name not in parts]

    def parts(self, name: str) -> list[str]:
        """The tensors a weight is stored as: itself, or the parts of its layout."""
        if name in self.quantized:
            return [self.quantized[name] + part for part in QUANTIZED_PARTS]
        if name not in self.packed:
            return [name]
        prefix = self.packed[name]
        return [prefix + part for part in PARTS if prefix + part in self.shards.entries]

    def layout(self, name: str) -> str:
        """``"dense"``, ``"sparse-bitmask"``, ``"sparse-24-bitmask"`` or ``"pack-quantized"``."""
        if name in self.quantized:
            return FORMAT
        if name not in self.packed:
            return "dense"
        return "sparse-bitmask" if f"{self.packed[name]}row_offsets" in self.shards.entries else "sparse-24-bitmask"

    def shape(self, name: str) -> torch.Size:
        """The shape of a weight."""
        if name not in self.packed and name not in self.quantized:
            return self.shards.shape(name)
        where = f"{self.packed[name]}shape" if name in self.packed else f"{self.quantized[name]}weight_shape"
        dims = self._part(where).reshape(-1).tolist()
        if any(type(d) is not int or d < 0 for d in dims):
            raise FileFormatError(f"{name!r} in the layout {self.layout(name)} is damaged: its shape is {dims}")
        return torch.Size(dims)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a weight."""
        if name in self.quantized:
            return self.shards.dtype(f"{self.quantized[name]}weight_scale")
        return self.shards.dtype(f"{self.packed[name]}compressed" if name in self.packed else name)

    def nbytes(self, name: str) -> int:
        """Bytes a weight has on disk."""
        return sum(self.shards.nbytes(part) for part in self.parts(name))

    def read(self, name: str) -> tuple[Tensor, SparseMask | None]:
        """A weight, dense, and its mask where the layout has one; verified where the file has a checksum.

        Raises:
            FileFormatError: If it is damaged; the tensor is named.
        """
        if name in self.quantized:
            prefix = self.quantized[name]
            return unpack_quantized({p.removeprefix(prefix): self._part(p) for p in self.parts(name)}, name), None
        if name not in self.packed:
            return self._part(name), None
        prefix = self.packed[name]
        return unpack_bitmask({part.removeprefix(prefix): self._part(part) for part in self.parts(name)}, name)

    def read_mask(self, name: str) -> SparseMask:
        """The mask of a weight in a bitmask layout, without its values.

        Raises:
            FileFormatError: If it is damaged; the tensor is named.
        """
        bits = self._part(f"{self.packed[name]}bitmask")
        try:
            return mask_from_bits(bits, self.shape(name))[0]
        except ValueError as error:
            raise FileFormatError(f"{name!r} in bitmask layout is damaged: {error}") from None

    def _part(self, name: str) -> Tensor:
        tensor = self.shards.read(name)
        if name in self.sums and tensor_checksum(tensor) != self.sums[name]:
            raise FileFormatError(
                f"{self.shards.folder / self.shards.file_of(name)}: tensor {name!r} does not match its checksum: the "
                "file is damaged"
            )
        return tensor


def _sealed(shards: Shards, path: object) -> tuple[dict[str, str], dict[str, str]]:
    """Checksums and ties of all files that have a header of ours."""
    sums: dict[str, str] = {}
    ties: dict[str, str] = {}
    for file, metadata in shards.metadata.items():
        if not any(key.startswith(SHARD_HEADER) for key in metadata):
            continue
        body = open_header(SHARD_HEADER, metadata, _VERSION, shards.folder / file)
        inside = {name for name, entry in shards.entries.items() if entry.file == file}
        if odd := sorted(inside ^ set(body["sha256"])):
            raise FileFormatError(f"{shards.folder / file}: tensors and header disagree about {odd[0]!r}")
        sums |= body["sha256"]
        ties |= body["ties"]
    if odd := sorted(name for name, owner in ties.items() if name in shards.entries or name == owner):
        raise FileFormatError(f"{path}: {odd[0]!r} is a tie by its header, and also a tensor")
    return sums, ties
