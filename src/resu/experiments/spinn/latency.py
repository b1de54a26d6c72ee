"""How long a prediction takes: networks measured in turn, so that a busy machine is unfair to none."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from resu.pruning.structured.sizes import time_in_turns

__all__ = ["latencies", "packed"]


def latencies(calls: Mapping[str, Callable[[], object]], rounds: int = 50) -> dict[str, float]:
    """Median seconds per call, measured in turns.

    Raises:
        ValueError: Without calls or rounds.

    Example:
        >>> sorted(latencies({"nothing": lambda: None, "a sum": lambda: sum(range(1000))}, rounds=3))
        ['a sum', 'nothing']
    """
    measured = time_in_turns(list(calls.values()), rounds=rounds, seconds=0.002)
    return dict(zip(calls, measured.seconds, strict=True))


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
