"""resu: sparse PyTorch networks, through training to real memory and real speed.

Names resolve on first use; ``import resu`` loads nothing else, not even torch.
"""

from __future__ import annotations

import importlib
from typing import Any

# name -> module that defines it
_NAMES = {
    "SparseMask": "resu.core.mask",
    "Unstructured": "resu.core.pattern",
    "NM": "resu.core.pattern",
    "Block": "resu.core.pattern",
    "Channel": "resu.core.pattern",
    "SelectionConfig": "resu.core.selective",
    "RESULinear": "resu.modules.linear",
    "RESUConv2d": "resu.modules.conv",
    "RESUMode": "resu.modules.base",
    "convert_to_resu": "resu.modules.convert",
    "get_resu_modules": "resu.modules.convert",
    "resurrection_parameters": "resu.modules.convert",
    "memory_report": "resu.modules.memory",
    "save_mask": "resu.pruning.mask_ops",
    "load_mask": "resu.pruning.mask_ops",
    "prune_model": "resu.pruning.one_shot",
    "MagnitudePruner": "resu.pruning.pruners",
    "GradualPruner": "resu.pruning.pruners",
    "prune_iteratively": "resu.pruning.pruners",
    "StructuredPruner": "resu.pruning.structured",
    "save_shrunk": "resu.pruning.structured",
    "load_shrunk": "resu.pruning.structured",
    "shrink_transformer": "resu.integrations.shrink.transform",
    "load_shrunk_transformer": "resu.integrations.shrink.loading",
    "prune_checkpoint": "resu.integrations.checkpoint",
    "reconstruct": "resu.pruning.reconstruction",
    "SparseLoRAConfig": "resu.pruning.sparse_lora",
    "apply_sparse_lora": "resu.pruning.sparse_lora",
    "measure_memory": "resu.core.peak_memory",
    "save_checkpoint": "resu.formats.files",
    "load_checkpoint": "resu.formats.files",
    "Sparsifier": "resu.training.sparsifier",
    "RESUConfig": "resu.training.config",
    "RESUCycle": "resu.training.cycle",
    "RESUTrainer": "resu.training.trainer",
}

__all__ = ["__version__", *_NAMES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("resu-torch")
        except PackageNotFoundError:  # run from a source tree that is not installed
            return "0+unknown"
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    try:  # resu.core, resu.pruning, … without an import statement of their own
        return importlib.import_module(f"resu.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"resu.{name}":
            raise
        raise AttributeError(f"module 'resu' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted(__all__)
