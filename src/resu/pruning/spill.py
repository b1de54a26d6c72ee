"""Activations that are too large for main memory wait in files: written once, mapped, paged in when they are read."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Spill"]


class Spill:
    """Keeps tensors in files of a folder that vanish with them.

    Args:
        folder: Where; it has to exist, and needs room for all that is kept.
        least: Bytes of a tensor from which on it goes to a file.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     kept = Spill(folder, least=0)(torch.arange(3))
        ...     kept, os.listdir(folder)
        (tensor([0, 1, 2]), [])
    """

    def __init__(self, folder: str | os.PathLike[str], least: int = 1 << 20) -> None:
        self.folder, self.least = Path(folder), least

    def __call__(self, x: Tensor) -> Tensor:
        """``x``, or an equal tensor in a file."""
        size = x.numel() * x.element_size()
        if x.device.type != "cpu" or not size or size < self.least:
            return x
        handle, path = tempfile.mkstemp(suffix=".activations", dir=self.folder)
        try:
            os.posix_fallocate(handle, 0, size)  # a full disk is an error here, not a crash when a page is written
            mapped = torch.from_file(path, shared=True, size=x.numel(), dtype=x.dtype)
        finally:
            os.close(handle)
            os.unlink(path)  # the mapping keeps it alive
        return mapped.view(x.shape).copy_(x)
