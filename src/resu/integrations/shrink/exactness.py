"""Copies of transformers in float64 and random tokens for them, to tell a right removal from one that is nearly so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resu.pruning.structured.verify import double_copy

__all__ = ["copy_in_float64", "random_batch"]


def copy_in_float64(model: Any) -> Any:
    """A copy in float64 and evaluation mode that returns no keys and values: those of removed heads are missing."""
    copied: Any = double_copy(model)
    if getattr(copied.config, "use_cache", None):
        copied.config.use_cache = False
    return copied


def random_batch(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """Two rows of random tokens, the second one padded at its end: int64 ``[2, tokens]``."""
    config = model.config
    tokens = max(2, min(12, int(getattr(config, "max_position_embeddings", None) or 14) - 2))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(min(3, int(config.vocab_size) - 1), int(config.vocab_size), (2, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, tokens - tokens // 4 :] = 0
    device = next(model.parameters()).device
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
