"""Random crops and flips whose choices come from outside, so that a batch follows from its numbers alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["DRAWS", "crop_and_flip"]

DRAWS = 5
"""Uniform numbers that each example of a training batch comes with."""


def crop_and_flip(x: Tensor, draws: Tensor, pad: int = 4) -> Tensor:
    """Each image moved by up to ``pad`` pixels, with zeros around it, and mirrored with probability one half.

    Args:
        x: ``[batch, channels, height, width]``, any dtype.
        draws: ``[batch, ≥ 3]``, uniform in [0, 1): of the row, the column, and the mirror.
        pad: Largest move in each direction.

    Example:
        >>> x = torch.arange(4).view(1, 1, 2, 2)
        >>> crop_and_flip(x, torch.tensor([[0.5, 0.5, 0.0]]), pad=1).tolist()  # no move, mirrored
        [[[[1, 0], [3, 2]]]]
    """
    height, width = x.shape[-2:]
    padded = F.pad(x, (pad, pad, pad, pad))
    offset = (draws[:, :2] * (2 * pad + 1)).long()
    rows = offset[:, :1] + torch.arange(height)
    columns = torch.arange(width).expand(len(x), width)
    columns = offset[:, 1:2] + torch.where(draws[:, 2:3] < 0.5, columns.flip(1), columns)
    picked = padded.permute(0, 2, 3, 1)[torch.arange(len(x))[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)
