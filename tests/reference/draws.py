"""Where a rule draws at random: uniform numbers that depend on (seed, layer, step) alone.

The k largest of n independent uniform numbers are k positions drawn without replacement.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch


def uniform(n: int, seed: int, name: str, step: int) -> Iterator[list[float]]:
    """One list of n numbers after another."""
    digest = hashlib.sha256(f"{seed}|{name}|{step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") // 2)
    while True:
        yield torch.rand(n, generator=generator, dtype=torch.float64).tolist()
