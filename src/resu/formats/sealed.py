"""A safetensors file with checksums, written tensor after tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resu.core.io import tensor_checksum, write_all
from resu.core.shards import DTYPES
from resu.formats.stored import seal_shard

__all__ = ["SealedWriter"]

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_UNKNOWN = "0" * 64  # holds the place of a checksum until it is known


class SealedWriter:
    """Writes a file whose tensors are known by dtype and shape, and come one at a time.

    Args:
        path: A file that is there already (see :func:`resu.core.io.replacing`).
        plan: ``{name: (dtype, shape)}`` of all tensors.
        ties: For :func:`resu.formats.stored.seal_shard`.
        metadata: More text for the header.

    Raises:
        ValueError: On a dtype that safetensors files do not have.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.safetensors")
        ...     path.touch()
        ...     writer = SealedWriter(path, {"a": (torch.int8, (2,))})
        ...     writer.add("a", torch.tensor([1, 2], dtype=torch.int8))
        ...     writer.close()
        ...     load_file(path)
        {'a': tensor([1, 2], dtype=torch.int8)}
    """

    def __init__(
        self,
        path: Path,
        plan: Mapping[str, tuple[torch.dtype, Sequence[int]]],
        ties: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self.plan, self.ties, self.metadata = path, dict(plan), dict(ties or {}), dict(metadata or {})
        self.sums = dict.fromkeys(self.plan, _UNKNOWN)
        self.places: dict[str, tuple[int, int]] = {}
        place = 0
        # Wide numbers first, so that each begins at a multiple of its size.
        for name in sorted(self.plan, key=lambda n: (-self.plan[n][0].itemsize, n)):
            dtype, shape = self.plan[name]
            if dtype not in _CODES:
                raise ValueError(f"{name!r} has dtype {dtype}, which safetensors files do not have")
            self.places[name] = (place, place + math.prod(shape) * dtype.itemsize)
            place = self.places[name][1]
        head = self._header()
        self.base = len(head)
        with open(path, "r+b") as file:
            file.write(head)
            file.truncate(self.base + place)

    def _header(self) -> bytes:
        body: dict[str, Any] = {"__metadata__": {**self.metadata, **seal_shard(self.sums, self.ties)}}
        for name, (start, stop) in self.places.items():
            dtype, shape = self.plan[name]
            body[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        text = json.dumps(body, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor.

        Raises:
            ValueError: If it is not what the plan says.
        """
        dtype, shape = self.plan[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{name!r} is {tensor.dtype} {tuple(tensor.shape)}; {dtype} {tuple(shape)} was announced for it"
            )
        data = tensor.detach().cpu().contiguous()
        self.sums[name] = tensor_checksum(data)
        if data.numel():
            with open(self.path, "r+b", buffering=0) as file:
                file.seek(self.base + self.places[name][0])
                write_all(file, data.reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Write the header with all checksums.

        Raises:
            ValueError: If a tensor has not come.
        """
        if missing := [name for name, value in self.sums.items() if value == _UNKNOWN]:
            raise ValueError(f"{missing[0]!r} was announced and has not been written")
        with open(self.path, "r+b") as file:
            file.write(self._header())
