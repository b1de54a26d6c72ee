"""Whether a smaller model can be trained as the masked one could: branches that only training takes are seen here."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from resu.pruning.snapshots import random_state, set_random_state
from resu.pruning.statistics import eager
from resu.pruning.structured.outputs import comparable, difference
from resu.pruning.structured.running import call, cloned, in_float64

__all__ = ["differs_in_training", "seeded"]

_LOOSER = 1e3  # norms over few values enlarge rounding


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the global generators (Python, numpy, torch) start from a seed; afterwards they are as before.

    Example:
        >>> with seeded(0):
        ...     a = torch.rand(1)
        >>> with seeded(0):
        ...     print(bool(torch.rand(1) == a))
        True
    """
    before = random_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        yield
    finally:
        set_random_state(before)


def differs_in_training(masked: nn.Module, small: nn.Module, inputs: Any, rtol: float) -> str:
    """What a smaller model does otherwise than the masked one in training mode; empty where nothing is known.

    Dropout layers are turned off. A model that draws numbers all the same, gives outputs that cannot be compared: of it
    is tried whether it runs, and gives outputs of the same shapes.

    Args:
        masked: In float64; not changed.
        small: In float64; not changed.
        inputs: In float64.
        rtol: Largest difference allowed in evaluation mode; in training a thousand times as much.
    """
    try:
        wanted, again = (_trained(masked, inputs, seed) for seed in (0, 1))
    except Exception:  # targets are missing, or batch norm wants more than one value: nothing is known then
        return ""
    if any(bool(x.isnan().any()) for x in wanted):
        return ""
    try:
        got = _trained(small, inputs, 0)
    except Exception as error:  # whatever a model may raise that does not fit together any more
        said = f"it does not run: {' '.join(str(error).split())[:200]}"
        return f"in training {said}; where a branch is for training only, take it out if the model is not to be trained"
    draws = any(not torch.equal(a, b) for a, b in zip(wanted, again, strict=False))
    check = difference(wanted, got, float("inf") if draws else rtol * _LOOSER)
    return check.reason and f"in training {check.reason}"


def _trained(model: nn.Module, inputs: Any, seed: int) -> list[Tensor]:
    own = copy.deepcopy(model).train()
    for module in own.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
    with seeded(seed), in_float64(), eager(own):
        return comparable(call(own, cloned(inputs)))
