"""What the other processes say when one of them is gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed

from resu.experiments.train.placement import Placement
from resu.experiments.train.state import State

__all__ = ["LostProcess", "watched"]

_SIGNS = ("gloo", "nccl", "connection", "peer", "socket")


class LostProcess(RuntimeError):
    """One of the processes that share a run ended before the run did."""


@contextmanager
def watched(placement: Placement, state: State) -> Iterator[None]:
    """Turn what the communication library says of a lost process into one line.

    Raises:
        LostProcess: If a process was lost in the body.
    """
    try:
        yield
    except RuntimeError as error:
        told = isinstance(error, distributed.DistError) or any(sign in str(error).lower() for sign in _SIGNS)
        if placement.ranks.world == 1 or not told:
            raise
        raise LostProcess(
            f"one of {placement.ranks.world} processes was lost at step {state.step}; start all of them again, "
            "and resume from the last checkpoint"
        ) from error
