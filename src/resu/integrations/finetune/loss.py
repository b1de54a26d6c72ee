"""The loss of classification and of masked tokens: a mean over all that a step counts, in whatever parts it is done."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from resu.integrations.finetune.batches import IGNORED

__all__ = ["mean_loss"]


def mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy in nats, summed over the labels that count, divided by ``num_items_in_batch``.

    The losses of many models for these tasks take that number and do not look at it: a step that is accumulated over
    several passes, or made by several processes, would then have a gradient as many times too large.

    Args:
        outputs: Has ``logits``, ``[batch, classes]`` or ``[batch, tokens, vocabulary]``.
        labels: int64 ``[batch]`` or ``[batch, tokens]``; -100 does not count.
        num_items_in_batch: Labels that count, of the whole step; None: of these.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> outputs = SimpleNamespace(logits=torch.zeros(4, 2))
        >>> float(mean_loss(outputs, torch.tensor([0, 1, 0, -100]), 3)) == float(torch.tensor(2.0).log())
        True
    """
    logits = outputs.logits.float().flatten(0, -2)
    labels = labels.reshape(-1).to(logits.device)
    if num_items_in_batch is None:
        return F.cross_entropy(logits, labels, ignore_index=IGNORED)
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / num_items_in_batch
