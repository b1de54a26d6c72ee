"""What is said of a run whose weights are no numbers any more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from resu.training.held_layer import HeldLayer

__all__ = ["divergence_told"]


@contextmanager
def divergence_told(held: Mapping[str, HeldLayer], step: int) -> Iterator[None]:
    """Name the layer and the step where an update cannot rank weights because they hold NaN.

    Looked for only once an update has failed, so a sound run pays nothing.

    Raises:
        FloatingPointError: Instead of the ``ValueError`` of a selection that met NaN.
    """
    try:
        yield
    except ValueError as error:
        for name, one in held.items():
            if torch.isnan(one.weight).any() or (one.theta is not None and torch.isnan(one.theta).any()):
                raise FloatingPointError(
                    f"{name!r} holds NaN after step {step}: training has diverged; lower the learning rate, clip "
                    "gradients, or begin with a warmup"
                ) from error
        raise
