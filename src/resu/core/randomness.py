"""Random choices that depend on what they are for, and on nothing that happened before."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["derived_generator", "derived_seed"]


def derived_seed(seed: int, *key: object) -> int:
    """A seed from ``seed`` and ``key``, the same in every process (Python's ``hash`` is not).

    Example:
        >>> derived_seed(0, "fc1.weight", 100) == derived_seed(0, "fc1.weight", 100)
        True
    """
    digest = hashlib.sha256("|".join(map(str, (seed, *key))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def derived_generator(seed: int, *key: object) -> torch.Generator:
    """A CPU generator seeded by :func:`derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(seed, *key))
