"""Independent runs on several cores: one process per core, one thread in each."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import torch

__all__ = ["WorkerDied", "default_workers", "spread"]

_shared: Any = None


class WorkerDied(RuntimeError):
    """A process ended before its work did."""


def default_workers(limit: int = 4) -> int:
    """The cores this process may use, ``limit`` at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, limit)


def spread(
    function: Callable[..., Any],
    shared: Any,
    jobs: Sequence[tuple[Any, ...]],
    workers: int,
    on_done: Callable[[tuple[Any, ...]], None] = lambda job: None,
) -> list[Any]:
    """``[function(shared, *job) for job in jobs]``, each call with one thread.

    Args:
        function: A function of a module, so that another process finds it by name.
        shared: What all calls need; sent to each process once.
        jobs: Arguments of the calls.
        workers: Processes; 1 stays in this one.
        on_done: Told of each job that is done, in the order of their ends.

    Returns:
        The results in the order of the jobs.

    Raises:
        WorkerDied: If a process dies (of memory, for one).
    """
    if workers == 1:
        return _here(function, shared, jobs, on_done)
    # Not forked: a copy of a process with threads may hang. Tensors travel as plain bytes, for shared memory
    # is scarce in containers.
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_begin, initargs=(pickle.dumps(shared),)
    )
    try:
        futures = {pool.submit(_call, function, job): index for index, job in enumerate(jobs)}
        results: list[Any] = [None] * len(jobs)
        for future in as_completed(futures):
            results[futures[future]] = pickle.loads(future.result())
            on_done(jobs[futures[future]])
    except BrokenProcessPool:
        raise WorkerDied(f"one of {workers} processes died, of memory perhaps; use fewer") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return results


def _here(
    function: Callable[..., Any],
    shared: Any,
    jobs: Sequence[tuple[Any, ...]],
    on_done: Callable[[tuple[Any, ...]], None],
) -> list[Any]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results = []
        for job in jobs:
            results.append(function(shared, *job))
            on_done(job)
        return results
    finally:
        torch.set_num_threads(before)


def _begin(packed: bytes) -> None:
    global _shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and stops the pool
    torch.set_num_threads(1)
    _shared = pickle.loads(packed)


def _call(function: Callable[..., Any], job: tuple[Any, ...]) -> bytes:
    return pickle.dumps(function(_shared, *job))
