"""Random tokens for a transformer, to tell a right removal from one that is nearly so; and how many it can read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["classifies", "longest_input", "random_batch"]


def longest_input(model: Any) -> int | None:
    """How many tokens a model can read at once; None where its configuration gives no limit.

    RoBERTa and its kin count positions from behind that of padding, so two of the places in their table are never used.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    for name, module in model.base_model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return limit - module.padding_idx - 1
    return limit


def random_batch(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """Two rows of up to twelve random tokens, the second one padded at its end: int64 ``[2, tokens]``.

    One row only for a decoder that classifies by the last token and was not told which token pads.
    """
    config = model.config
    tokens = min(12, longest_input(model) or 12)
    rows = 1 if classifies(model) and getattr(config, "pad_token_id", None) is None else 2
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(min(3, int(config.vocab_size) - 1), int(config.vocab_size), (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, tokens - tokens // 4 :] = 0
    device = next(model.parameters()).device
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def classifies(model: Any) -> bool:
    """Whether a model gives one row of logits per text."""
    return type(model).__name__.endswith("ForSequenceClassification")
