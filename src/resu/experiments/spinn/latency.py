"""How long a prediction takes: networks measured in turn, so that a busy machine is unfair to none."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch import Tensor, nn

__all__ = ["latencies", "packed"]


def latencies(calls: Mapping[str, Callable[[], object]], rounds: int = 50, repeats: int = 5) -> dict[str, float]:
    """Median seconds per call; in each round every call is timed once, ``repeats`` times over.

    Example:
        >>> sorted(latencies({"nothing": lambda: None, "a sum": lambda: sum(range(1000))}, rounds=3))
        ['a sum', 'nothing']
    """
    if not calls or rounds < 1 or repeats < 1:
        raise ValueError("timing needs something to call, and at least one round and one repeat")
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            for _ in range(repeats):
                call()
            found[name].append((time.perf_counter() - began) / repeats)
    return {name: median(times) for name, times in found.items()}


def _rows(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        csr = weight.to_sparse_csr()
        # 32-bit indices are faster.
        return torch.sparse_csr_tensor(
            csr.crow_indices().int(), csr.col_indices().int(), csr.values(), csr.shape, check_invariants=False
        )


def packed(network: nn.Sequential) -> Callable[[Tensor], Tensor]:
    """A sparse network whose matrices are stored in compressed rows (CSR), as a function of ``[rows, inputs]``.

    Zeros are those of the weights: for a network that is done with training.
    """
    parts: list[tuple[Tensor, Tensor] | None] = []
    for layer in network:
        if isinstance(layer, nn.Linear):
            weight = layer.weight.detach()
            parts.append((_rows(weight), layer.bias.detach()))
        else:
            parts.append(None)

    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            for part in parts:
                x = torch.tanh(x) if part is None else torch.nn.functional.linear(x, part[0]) + part[1]
        return x

    return call
