"""Safetensors checkpoints read tensor by tensor, whatever their size: one file, or shards with or without an index.

Files are read with plain reads into buffers of their own, not memory-mapped: a mapped page counts as memory of the
process for as long as the system likes, and a bound on memory could not be kept. Headers are parsed and checked here,
so that every byte that is read is known to lie inside its file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resu.core.io import FileFormatError

__all__ = ["DTYPES", "Entry", "Shards", "read_header"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
if hasattr(torch, "float8_e8m0fnu"):  # absent in torch 2.4, which Cerebras' ModelZoo pins
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
_LARGEST_HEADER = 100_000_000  # as the safetensors library has it
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_NUMBERED = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        file: The file's name.
        dtype: Safetensors code, e.g. ``"BF16"``.
        shape: Its shape.
        start: First byte, counted from the beginning of the file.
        stop: Byte after the last.
    """

    file: str
    dtype: str
    shape: torch.Size
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.stop - self.start


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, Entry], dict[str, str]]:
    """Tensors (in the order of their bytes) and metadata of one safetensors file; no tensor is read.

    Raises:
        FileNotFoundError: If there is no such file.
        FileFormatError: If it is truncated, damaged or something else; the file is named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise FileFormatError(
                f"{path} is truncated or no safetensors file: its header does not fit into {size} bytes"
            )
        text = file.read(length)
    try:
        given = json.loads(text, object_pairs_hook=_unique)
        metadata = given.pop("__metadata__", None) or {}
        entries = [(name, _entry(path.name, value, 8 + length)) for name, value in given.items()]
        if not isinstance(metadata, dict):
            raise TypeError
    except (TypeError, KeyError, AttributeError, RecursionError):
        raise FileFormatError(
            f"{path} has a damaged safetensors header: it must be an object with dtype, shape and data_offsets for "
            "each tensor, and with texts in __metadata__"
        ) from None
    except ValueError as error:
        raise FileFormatError(f"{path} has a damaged safetensors header: {error}") from None
    entries.sort(key=lambda item: (item[1].start, item[1].stop))
    end = 8 + length
    for name, entry in entries:
        if entry.start != end:
            raise FileFormatError(f"{path} has a damaged header: {name!r} starts at byte {entry.start}, not {end}")
        end = entry.stop
    if end > size:
        raise FileFormatError(f"{path} is truncated: it has {size} bytes, its header says {end}; fetch it again")
    if end < size:
        raise FileFormatError(f"{path} is damaged: it has {size} bytes, its header says {end}")
    return dict(entries), metadata


def _entry(file: str, value: Mapping[str, Any], base: int) -> Entry:
    shape = torch.Size(value["shape"])
    start, stop = value["data_offsets"]
    if any(type(n) is not int or n < 0 for n in (*value["shape"], start, stop)) or stop < start:
        raise ValueError("a shape or an offset is no integer of zero or more")
    code = value["dtype"]
    if code in DTYPES and shape.numel() * DTYPES[code].itemsize != stop - start:
        raise ValueError(f"a tensor of shape {tuple(shape)} and dtype {code} does not have {stop - start} bytes")
    return Entry(file, code, shape, base + start, base + stop)


@dataclass(frozen=True)
class Shards:
    """The tensors of a checkpoint, by name; nothing is read until it is asked for.

    Attributes:
        folder: Where the files are.
        entries: ``{name: Entry}``, in the order of the files and of the bytes in them.
        metadata: ``{file: its safetensors metadata}``.
        index: What ``model.safetensors.index.json`` says, or None.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"a": torch.ones(2, 3), "b": torch.zeros(4)}, f"{folder}/model.safetensors")
        ...     shards = Shards.open(folder)
        ...     shards.names, shards.shape("a"), shards.dtype("b"), shards.read("a").sum()
        (['a', 'b'], torch.Size([2, 3]), torch.float32, tensor(6.))
    """

    folder: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    index: Mapping[str, Any] | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Shards:
        """The checkpoint at ``path``: a folder, with or without an index, or one safetensors file.

        Raises:
            FileNotFoundError: If there is nothing at ``path``, or a shard is missing that the index names.
            FileFormatError: If a file is truncated or damaged, or the index disagrees with the files.
            ValueError: If there is no safetensors file but pickles, or it is not clear which files are meant.
        """
        path = Path(path)
        if path.is_file():
            if path.suffix != ".safetensors":
                raise ValueError(_refusal(path))
            return cls._of(path.parent, [path.name], None)
        if not path.is_dir():
            raise FileNotFoundError(f"there is no file or folder {path}")
        if (path / INDEX).is_file():
            if (path / SINGLE).is_file():
                raise ValueError(f"{path} holds both {SINGLE} and {INDEX}; remove one, or name the file that is meant")
            return cls._indexed(path)
        return cls._of(path, _files_without_index(path), None)

    @classmethod
    def _of(cls, folder: Path, files: list[str], index: Mapping[str, Any] | None) -> Shards:
        entries: dict[str, Entry] = {}
        metadata = {}
        for file in files:
            found, metadata[file] = read_header(folder / file)
            for name, entry in found.items():
                if name in entries:
                    raise FileFormatError(f"tensor {name!r} is in {entries[name].file} and again in {file} ({folder})")
                entries[name] = entry
        return cls(folder, entries, metadata, index)

    @classmethod
    def _indexed(cls, folder: Path) -> Shards:
        where = folder / INDEX
        index = _read_index(where)
        places: dict[str, str] = index["weight_map"]
        files = sorted(set(places.values()))
        if odd := [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]:
            raise FileFormatError(f"{where} names {odd[0]!r}, which is no safetensors file of that folder")
        for file in files:
            if not (folder / file).is_file():
                raise FileNotFoundError(f"shard {file} is missing in {folder}; its index names it. Fetch it again")
        found = cls._of(folder, files, index)
        for name in sorted({*places, *found.entries}):
            entry = found.entries.get(name)
            if entry is None or places.get(name) != entry.file:
                told = f"in {places[name]}" if name in places else "nowhere"
                real = f"in {entry.file}" if entry is not None else "nowhere"
                raise FileFormatError(
                    f"{where} disagrees with the files: tensor {name!r} should be {told}, it is {real}"
                )
        return found

    @property
    def names(self) -> list[str]:
        """All tensors, in the order of the files and of the bytes in them."""
        return list(self.entries)

    @property
    def files(self) -> list[str]:
        """The names of the files."""
        return list(self.metadata)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """``{name: shape}``."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def _entry(self, name: str) -> Entry:
        try:
            return self.entries[name]
        except KeyError:
            raise KeyError(f"there is no tensor {name!r} in {self.folder}") from None

    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor.

        Raises:
            FileFormatError: If torch has no such dtype.
        """
        entry = self._entry(name)
        if entry.dtype not in DTYPES:
            raise FileFormatError(
                f"tensor {name!r} of {entry.file} has dtype {entry.dtype}, which cannot be read; "
                f"known: {', '.join(DTYPES)}"
            )
        return DTYPES[entry.dtype]

    def file_of(self, name: str) -> str:
        """The name of the file that holds a tensor."""
        return self._entry(name).file

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor on disk."""
        return self._entry(name).nbytes

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own.

        Raises:
            FileFormatError: If the file has become shorter, or torch has no such dtype.
        """
        shape = self.shape(name)
        return next(self.chunks(name, max(1, shape.numel()))).view(shape)

    def chunks(self, name: str, size: int, span: tuple[int, int] | None = None) -> Iterator[Tensor]:
        """The elements of a tensor in order, flat, at most ``size`` at a time; at least one chunk comes.

        A chunk is overwritten by the next one, so that one buffer serves for all.

        Args:
            name: Which.
            size: Elements per chunk.
            span: First element and the one after the last; None: all.
        """
        entry, dtype = self._entry(name), self.dtype(name)
        first, last = span if span is not None else (0, entry.shape.numel())
        buffer = torch.empty(min(size, last - first) * dtype.itemsize, dtype=torch.uint8)
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]
        with open(self.folder / entry.file, "rb", buffering=0) as file:
            file.seek(entry.start + first * dtype.itemsize)
            for start in range(first, max(last, first + 1), size):
                wanted = (min(start + size, last) - start) * dtype.itemsize
                read_into(file, view[:wanted], entry.file)
                yield buffer[:wanted].view(dtype)


def read_into(file: Any, view: memoryview, name: str) -> None:
    """Fill ``view`` from an unbuffered file.

    Raises:
        FileFormatError: If the file ends before.
    """
    done = 0
    while done < len(view):
        got = file.readinto(view[done:])
        if not got:
            raise FileFormatError(f"{name} ended {len(view) - done} bytes too early: it was truncated while being read")
        done += got


def _read_index(where: Path) -> dict[str, Any]:
    """What an index says, its parts checked to be of the right kinds."""
    wanted = 'it must be an object with "weight_map": {tensor name: file name}'
    try:
        index = json.loads(where.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{where} is damaged: {wanted}, and cannot be read: {error}") from None
    if not isinstance(index, dict):
        raise FileFormatError(f"{where} is damaged: {wanted}, not {_kind(index)}")
    if "weight_map" not in index:
        raise FileFormatError(f'{where} is damaged: {wanted}; it has no "weight_map"')
    places = index["weight_map"]
    if not isinstance(places, dict):
        raise FileFormatError(f'{where} is damaged: {wanted}; its "weight_map" is {_kind(places)}')
    for name, file in places.items():
        if not isinstance(file, str):
            raise FileFormatError(f"{where} is damaged: {wanted}; for tensor {name!r} it has {_kind(file)}")
    if not isinstance(index.get("metadata") or {}, dict):
        raise FileFormatError(f'{where} is damaged: its "metadata" must be an object, not {_kind(index["metadata"])}')
    return index


def _kind(value: Any) -> str:
    """What a value from JSON is called there."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {"list": "a list", "str": "a text", "dict": "an object"}
    return names.get(type(value).__name__, "a number")


def _files_without_index(folder: Path) -> list[str]:
    if (folder / SINGLE).is_file():
        return [SINGLE]
    # A mask file of ours may lie beside the shards.
    files = sorted(file.name for file in folder.glob("*.safetensors") if file.name != "masks.safetensors")
    if not files:
        pickles = sorted(file for file in folder.iterdir() if file.suffix in _PICKLES)
        raise ValueError(_refusal(pickles[0]) if pickles else f"the folder {folder} holds no safetensors file")
    for file in files:
        if found := _NUMBERED.fullmatch(file):
            stem, _, total = found.groups()
            for number in range(1, int(total) + 1):
                wanted = f"{stem}-{number:0{len(total)}d}-of-{total}.safetensors"
                if wanted not in files:
                    raise FileNotFoundError(f"shard {wanted} is missing in {folder}; {file} says that it exists")
    return files


def _refusal(path: Path) -> str:
    if path.suffix in _PICKLES:
        return (
            f"{path} is a pickle, which can run code when it is opened, and is not read; convert it: load it where you "
            "trust it and save it with safetensors (transformers: save_pretrained)"
        )
    return f"{path} is no safetensors file (by its ending); give a .safetensors file or a folder of them"
