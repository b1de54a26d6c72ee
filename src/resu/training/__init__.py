"""Sparse training: the driver, its algorithms, and the cycles. Names resolve on first use."""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "Sparsifier": "resu.training.sparsifier",
    "Algorithm": "resu.training.algorithms",
    "Static": "resu.training.algorithms",
    "Magnitude": "resu.training.algorithms",
    "RESU": "resu.training.algorithms",
    "SET": "resu.training.algorithms",
    "RigL": "resu.training.algorithms",
    "MEST": "resu.training.algorithms",
    "GraNet": "resu.training.algorithms",
    "ACDC": "resu.training.algorithms",
    "TopKAST": "resu.training.algorithms",
    "STE": "resu.training.algorithms",
    "SRigL": "resu.training.algorithms",
    "SNFS": "resu.training.algorithms",
    "AdamW8bit": "resu.training.adamw8bit",
    "optimizer_in_backward": "resu.training.update_in_backward",
    "RESUConfig": "resu.training.config",
    "SparsitySchedule": "resu.training.config",
    "default_config": "resu.training.config",
    "aggressive_pruning_config": "resu.training.config",
    "conservative_pruning_config": "resu.training.config",
    "densification_config": "resu.training.config",
    "quick_test_config": "resu.training.config",
    "CycleStats": "resu.training.cycle",
    "RESUCycle": "resu.training.cycle",
    "RESUTrainer": "resu.training.trainer",
}

__all__ = [*_NAMES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'resu.training' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
