"""Pruned safetensors files written tensor after tensor, in memory of a few chunks.

A header comes before the data and holds what is known only after it (checksums, and in the bitmask layout the
counts), so its place is kept free and filled at the end. Files appear whole and on disk, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from resu.core.io import replacing, write_all
from resu.core.mask import count_bits
from resu.core.mask_stream import BitWriter, aligned, packed_bytes
from resu.core.shards import DTYPES, Entry, Shards
from resu.formats.stored import seal_shard

__all__ = ["LAYOUTS", "Masker", "is_packed", "write_shard"]

LAYOUTS = ("dense", "bitmask")
CHUNK = 1 << 20  # elements handled at a time
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNKNOWN = "0" * 64  # holds the place of a checksum


class Masker(Protocol):
    """Masks of one tensor, chunk after chunk in order."""

    @property
    def unit(self) -> int:
        """Chunks hold a multiple of so many weights; the last one may be shorter."""

    def __call__(self, weights: Tensor) -> Tensor:
        """Flat bool mask of a flat chunk, True = kept."""


Maskers = Mapping[str, Callable[[], Masker]]


@dataclass
class _Part:
    """One tensor of the new file; ``stop`` and ``sha256`` may be known late."""

    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    stop: int = 0
    sha256: str = _UNKNOWN


def is_packed(name: str, entry: Entry, layout: str) -> bool:
    """Whether a pruned tensor is stored as kept values and bits: matrices called "weight", as readers expect them."""
    return layout == "bitmask" and len(entry.shape) == 2 and name.rpartition(".")[2] == "weight"


def write_shard(
    source: Shards,
    file: str,
    target: str | os.PathLike[str],
    maskers: Maskers,
    bits: str | os.PathLike[str],
    *,
    layout: str = "dense",
    workers: int = 1,
    overwrite: bool = False,
    tick: Callable[[int], None] = lambda done: None,
) -> dict[str, dict[str, Any]]:
    """Write one file of a checkpoint again, with +0.0 (or nothing) at pruned positions.

    The dense layout has the names, dtypes, shapes and order of the source. In the bitmask layout, matrices called
    "weight" that have a mask become ``shape, compressed, bitmask, row_offsets``; other pruned tensors stay dense.

    Args:
        source: The checkpoint.
        file: Which of its files.
        target: The new file.
        maskers: ``{tensor: function that makes its masker}``; tensors without one are copied.
        bits: Where the packed masks of this file's tensors go, one after the other without gaps.
        layout: ``"dense"`` or ``"bitmask"``.
        workers: Threads over tensors, in the dense layout.
        overwrite: Whether files that are there may be replaced.
        tick: Called with the number of elements that have been written.

    Returns:
        ``{tensor: {"shape", "kept", "sha256"}}`` of the masks, as mask files say it, in the order of ``bits``.

    Raises:
        FileExistsError: If a file is there and ``overwrite`` is False.
        OSError: If a file cannot be written; what was there before is whole.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file, save_file
        >>> class Positive:
        ...     unit = 1
        ...     def __call__(self, weights):
        ...         return weights > 0
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"fc.weight": torch.tensor([[1.0, -2.0]])}, f"{folder}/a.safetensors")
        ...     source = Shards.open(f"{folder}/a.safetensors")
        ...     entries = write_shard(source, "a.safetensors", f"{folder}/b.safetensors", {"fc.weight": Positive},
        ...                           f"{folder}/bits")
        ...     entries["fc.weight"]["kept"], load_file(f"{folder}/b.safetensors")["fc.weight"]
        (1, tensor([[1., 0.]]))
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be 'dense' or 'bitmask', got {layout!r}")
    entries = {name: entry for name, entry in source.entries.items() if entry.file == file}
    for name in entries:
        source.dtype(name)  # raises where it is not known
    masked = [name for name in entries if name in maskers]
    ends = np.cumsum([0, *(packed_bytes(entries[name].shape) for name in masked)]).tolist()
    metadata = {k: v for k, v in source.metadata[file].items() if not k.startswith("resu_")}
    with replacing(bits, overwrite=overwrite) as spool, replacing(target, overwrite=overwrite) as temporary:
        job = _Job(source, entries, maskers, dict(zip(masked, ends, strict=False)), spool, temporary, metadata, tick)
        return job.dense(workers) if layout == "dense" else job.bitmask()


@dataclass
class _Job:
    source: Shards
    entries: Mapping[str, Entry]
    maskers: Maskers
    places: Mapping[str, int]  # of masks in the file of bits
    spool: Path
    temporary: Path
    metadata: Mapping[str, str]
    tick: Callable[[int], None]

    def header(self, parts: Mapping[str, _Part], size: int | None = None) -> bytes:
        """The file's header; padded to ``size`` where one is given."""
        body: dict[str, Any] = {
            "__metadata__": {**self.metadata, **seal_shard({name: part.sha256 for name, part in parts.items()})}
        }
        for name, part in parts.items():
            body[name] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": [part.start, part.stop]}
        text = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * ((size - len(text)) if size is not None else -len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def weights(self, name: str, bits: IO[bytes]) -> Iterator[tuple[Tensor, Tensor]]:
        """Chunks of a tensor with their masks, which are written on the way; at last its entry is known."""
        masker, shape = self.maskers[name](), self.entries[name].shape
        writer = BitWriter(bits, self.places[name], shape)
        for chunk in self.source.chunks(name, aligned(shape, CHUNK, masker.unit)):
            mask = masker(chunk)
            writer.add(mask)
            yield chunk, mask
            self.tick(chunk.numel())
        self.kept[name] = writer.entry()

    def zeroed(self, name: str, bits: IO[bytes]) -> Iterator[Tensor]:
        """Chunks of a tensor as they are stored densely."""
        if name not in self.maskers:
            for chunk in self.source.chunks(name, CHUNK):
                yield chunk
                self.tick(chunk.numel())
            return
        for chunk, mask in self.weights(name, bits):
            words = chunk.view(_WORDS[chunk.element_size()]).numpy()
            np.multiply(words, mask.numpy(), out=words)  # of the bits: no -0.0, and kept values stay as they are
            yield chunk

    def copy(self, name: str, part: _Part, base: int, bits: IO[bytes], file: IO[bytes]) -> None:
        """Write a tensor at its place, with zeros where it is pruned."""
        digest = _digest(self.source.dtype(name), part.shape)
        file.seek(base + part.start)
        for chunk in self.zeroed(name, bits):
            data = chunk.view(torch.uint8).numpy().data
            digest.update(data)
            write_all(file, data)
        part.sha256 = digest.hexdigest()

    def dense(self, workers: int) -> dict[str, dict[str, Any]]:
        """The dense layout: every place is known, so tensors are written in parallel."""
        self.kept: dict[str, dict[str, Any]] = {}
        first = min((entry.start for entry in self.entries.values()), default=0)
        parts = {n: _Part(e.dtype, tuple(e.shape), e.start - first, e.stop - first) for n, e in self.entries.items()}
        base = len(self.header(parts))

        def one(name: str) -> None:
            with open(self.spool, "r+b", buffering=0) as bits, open(self.temporary, "r+b", buffering=0) as file:
                self.copy(name, parts[name], base, bits, file)

        with ThreadPoolExecutor(max(1, workers)) as pool:
            tasks = [pool.submit(one, name) for name in parts]
            try:
                for task in tasks:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
        with open(self.temporary, "r+b") as file:
            file.write(self.header(parts))
        return {name: self.kept[name] for name in self.places}

    def bitmask(self) -> dict[str, dict[str, Any]]:
        """The bitmask layout: how long a tensor becomes is known after it, so one follows the other."""
        self.kept = {}
        parts: dict[str, _Part] = {}
        origin: dict[str, str] = {}
        for name, entry in self.entries.items():
            if name in self.maskers and is_packed(name, entry, "bitmask"):
                prefix, (rows, columns) = name.removesuffix("weight"), entry.shape
                parts[f"{prefix}shape"] = _Part("I64", (2,))
                parts[f"{prefix}compressed"] = _Part(entry.dtype, (rows * columns,))
                parts[f"{prefix}bitmask"] = _Part("U8", (rows, -(-columns // 8)))
                parts[f"{prefix}row_offsets"] = _Part("I64", (rows,))
                origin |= {f"{prefix}{part}": name for part in ("shape", "compressed", "bitmask", "row_offsets")}
            else:
                parts[name] = _Part(entry.dtype, tuple(entry.shape))
        # Wide numbers first, so that each begins at a multiple of its size; the bits, which come last, by then exist.
        order = sorted(parts, key=lambda n: (-DTYPES[parts[n].dtype].itemsize, n in origin and n.endswith("bitmask")))
        parts = {name: parts[name] for name in order}
        place = 0
        for part in parts.values():  # the longest the header can become
            place, part.start, part.stop = place + _nbytes(part), place, place + _nbytes(part)
        size = len(self.header(parts)) - 8
        base, place = size + 8, 0
        with open(self.spool, "r+b") as bits, open(self.temporary, "r+b") as file:
            for name, part in parts.items():
                part.start = place
                source = origin.get(name)
                if source is None:
                    self.copy(name, part, base, bits, file)
                elif name.endswith("compressed"):
                    self.compress(source, part, base, bits, file)
                elif name.endswith("shape"):
                    self.small(torch.tensor(self.entries[source].shape), part, base, file)
                elif name.endswith("bitmask"):
                    self.rows(source, part, parts[name.removesuffix("bitmask") + "row_offsets"], base, bits, file)
                place = part.stop = place + _nbytes(part)
            file.seek(0)
            file.write(self.header(parts, size))
            file.truncate(base + place)
        return {name: self.kept[name] for name in self.places}

    def small(self, tensor: Tensor, part: _Part, base: int, file: IO[bytes]) -> None:
        """Write a tensor that is in memory."""
        digest, data = _digest(tensor.dtype, part.shape), tensor.view(torch.uint8).numpy().data
        digest.update(data)
        part.sha256 = digest.hexdigest()
        file.seek(base + part.start)
        file.write(data)

    def compress(self, name: str, part: _Part, base: int, bits: IO[bytes], file: IO[bytes]) -> None:
        """Write the kept values of a tensor."""
        file.seek(base + part.start)
        kept = 0
        for chunk, mask in self.weights(name, bits):
            words = chunk.view(_WORDS[chunk.element_size()]).numpy()
            values = words.take(np.flatnonzero(mask.numpy()))
            kept += len(values)
            file.write(values.data)
        part.shape = (kept,)
        digest = _digest(self.source.dtype(name), part.shape)  # begins with the shape, so it is made from the file
        file.flush()
        file.seek(base + part.start)
        left = _nbytes(part)
        while left:
            data = file.read(min(left, CHUNK))
            digest.update(data)
            left -= len(data)
        part.sha256 = digest.hexdigest()

    def rows(self, name: str, part: _Part, offsets: _Part, base: int, bits: IO[bytes], file: IO[bytes]) -> None:
        """Write the bits of a tensor and where its rows begin."""
        rows, width = part.shape
        digest, counts = _digest(torch.uint8, part.shape), torch.empty(rows, dtype=torch.int64)
        bits.flush()
        bits.seek(self.places[name])
        file.seek(base + part.start)
        step = max(1, CHUNK // max(1, width))
        for row in range(0, rows, step):
            data = bytearray(bits.read(min(step, rows - row) * width))
            digest.update(data)
            file.write(data)
            counts[row : row + step] = count_bits(torch.frombuffer(data, dtype=torch.uint8).view(-1, width))
        part.sha256 = digest.hexdigest()
        self.small(counts.cumsum(0) - counts, offsets, base, file)


def _nbytes(part: _Part) -> int:
    return int(np.prod(part.shape, dtype=np.int64)) * DTYPES[part.dtype].itemsize


def _digest(dtype: torch.dtype, shape: tuple[int, ...]) -> Any:
    """The beginning of :func:`resu.core.io.tensor_checksum`."""
    return hashlib.sha256(f"{dtype} {tuple(shape)}".encode())
