"""Ridge regression on the same inputs: what a network has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from resu.experiments.spinn.origins import rolling_origins
from resu.experiments.spinn.recording import SPREAD, Prepared

__all__ = ["ridge", "ridge_weights"]

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


def ridge(data: Prepared, *, also_validation: bool = False) -> tuple[Tensor, float]:
    """Predictions for all rows, ``[rows, channels]``, and the penalty, which is chosen as that of networks is.

    That is by rolling origins for one series that is split in time, else on the validation part.

    Args:
        data: A recording with its split.
        also_validation: Fit on the validation part too, once the penalty is chosen: rows that no network trains on.
    """
    x, y = data.inputs.double() / SPREAD, data.targets.double()
    best = _penalty(data)
    rows = torch.cat([data.train, data.val]) if also_validation else data.train
    w, b = ridge_weights(x[rows], y[rows], best)
    return (x @ w + b).float(), best


def _penalty(data: Prepared) -> float:
    splits = [(fold, fold.test) for fold in rolling_origins(data.recording)]
    if not splits and len(data.val):
        splits = [(data, data.val)]
    found = dict.fromkeys(PENALTIES, 0.0)
    for split, judged in splits:
        x, y = split.inputs.double() / SPREAD, split.targets.double()
        spread = data.targets[data.train].double().var(0)
        for penalty in PENALTIES:
            w, b = ridge_weights(x[split.train], y[split.train], penalty)
            found[penalty] += float(((x[judged] @ w + b - y[judged]).square().mean(0) / spread).mean())
    return min(found, key=lambda p: found[p]) if splits else PENALTIES[2]
