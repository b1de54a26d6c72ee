"""Several processes that work on one thing: who does which part, and sums over all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Ranks", "joined"]


@dataclass(frozen=True)
class Ranks:
    """This process among ``world`` ones; sums are exact, they are over integers.

    Example:
        >>> Ranks().mine({"a": 4, "b": 9})
        ['a', 'b']
        >>> Ranks(rank=1, world=2).mine({"a": 4, "b": 9, "c": 3})
        ['a', 'c']
    """

    rank: int = 0
    world: int = 1

    def mine(self, costs: Mapping[str, int]) -> list[str]:
        """The names this process takes, in their order: the largest first, each to who has least so far."""
        loads = [0] * self.world
        owner = {}
        for name in sorted(costs, key=lambda n: -costs[n]):  # stable: the same on every rank
            owner[name] = loads.index(min(loads))
            loads[owner[name]] += costs[name]
        return [name for name in costs if owner[name] == self.rank]

    def sum(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sum over all processes; every one gets it."""
        if self.world == 1:
            return counts
        total = torch.from_numpy(np.ascontiguousarray(counts)).clone()
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        moved = total.to(device)
        torch.distributed.all_reduce(moved)
        summed: NDArray[np.int64] = moved.cpu().numpy()
        return summed

    def barrier(self) -> None:
        """Wait for all processes."""
        self.sum(np.zeros(1, dtype=np.int64))


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that ``torchrun`` started, or those of a process group that is there; alone without either.

    A process group that is made here (gloo) is taken down at the end.
    """
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    if there:
        yield Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
        return
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield Ranks()
        return
    torch.distributed.init_process_group("gloo")
    try:
        yield Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
        torch.distributed.barrier()  # a process that is done must not take the group from one that is not
    finally:
        torch.distributed.destroy_process_group()
