"""Ridge regression on the same inputs: what a network has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from resu.experiments.spinn.origins import rolling_origins
from resu.experiments.spinn.recording import SPREAD, Prepared

__all__ = ["ridge", "ridge_penalty", "ridge_weights"]

PENALTIES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


def ridge_weights(inputs: Tensor, targets: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """``(w, b)`` that minimize ``|x w + b − y|² + penalty·|w|²``; b is not penalized.

    Args:
        inputs: ``[rows, features]`` float64.
        targets: ``[rows, channels]`` float64.
        penalty: > 0.

    Returns:
        ``[features, channels]`` and ``[channels]``.
    """
    x, y = inputs - inputs.mean(0), targets - targets.mean(0)
    w = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    return w, targets.mean(0) - inputs.mean(0) @ w


def ridge(data: Prepared, penalty: float, *, also_validation: bool = False) -> Tensor:
    """Predictions for all rows, ``[rows, channels]``.

    Args:
        data: A recording with its split.
        penalty: On squared weights, for inputs of standard deviation 1.
        also_validation: Fit on the validation part too: rows that no network trains on.
    """
    x, y = data.inputs.double() / SPREAD, data.targets.double()
    rows = torch.cat([data.train, data.val]) if also_validation else data.train
    w, b = ridge_weights(x[rows], y[rows], penalty)
    return (x @ w + b).float()


def ridge_penalty(data: Prepared) -> float:
    """Of :data:`PENALTIES` the best: on rolling origins for one series split in time, else on the validation part."""
    splits = [(fold, fold.test) for fold in rolling_origins(data.recording)]
    if not splits and len(data.val):
        splits = [(data, data.val)]
    spread = data.targets[data.train].double().var(0)
    found = dict.fromkeys(PENALTIES, 0.0)
    for split, judged in splits:
        x, y = split.inputs.double() / SPREAD, split.targets.double()
        for penalty in PENALTIES:
            w, b = ridge_weights(x[split.train], y[split.train], penalty)
            found[penalty] += float(((x[judged] @ w + b - y[judged]).square().mean(0) / spread).mean())
    return min(found, key=lambda p: found[p]) if splits else PENALTIES[2]
