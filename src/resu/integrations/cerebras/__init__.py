"""Masks and resurrection for Cerebras' ModelZoo: configuration, a callback, a sparsity algorithm, checkpoints.

What needs ``cerebras.modelzoo`` or ``cerebras.pytorch`` is imported when it is first used; the rest works without them.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["RESU", "SparseMaskCallback", "create_sparse_config", "sparsity_block", "write_cerebras"]

_PLACES = {
    "RESU": "algorithm",
    "SparseMaskCallback": "callback",
    "create_sparse_config": "config",
    "sparsity_block": "config",
    "write_cerebras": "export",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
