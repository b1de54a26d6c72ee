"""Measured memory of a piece of a program: the most bytes that tensors held at once, insides of operators too.

On the CPU the allocator reports every allocation to torch's profiler, wherever it is made: in Python, in the C++ code
of an operator, in a custom one. Following these reports gives the exact peak; a dispatch mode would miss what is
allocated and freed inside one operator. On CUDA the caching allocator keeps the same statistics itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.autograd import profiler

__all__ = ["MemoryUse", "measure_memory", "resident_memory"]


@dataclass
class MemoryUse:
    """Bytes, filled in when the ``with`` block of :func:`measure_memory` ends.

    Attributes:
        peak: The most that tensors made in the block held at once.
        current: What of it is still held at the end.
        resident: How much more memory than at the start the process had at most (everything: NumPy's arrays,
            libraries' buffers, what allocators keep), on Linux and the CPU; None elsewhere.
    """

    peak: int = 0
    current: int = 0
    resident: int | None = None


@contextmanager
def measure_memory(device: torch.device | str = "cpu") -> Iterator[MemoryUse]:
    """Measure the memory that the block needs beyond what existed before it.

    A tensor from before that is freed in the block does not lower the figures of the CPU: begin with gradients set to
    None, and add what model and optimizer hold already. Memory of NumPy arrays belongs to no tensor's storage and shows
    in ``resident`` alone. It costs some microseconds per operator, and about a kilobyte per allocation until the end.

    Args:
        device: Where the tensors are: the CPU or a CUDA device.

    Raises:
        RuntimeError: If torch's profiler is running already (CPU), for there can be one at a time.
        ValueError: On another kind of device.

    Example:
        >>> with measure_memory() as used:
        ...     x = torch.ones(1000)
        ...     y = x.exp().sum()
        >>> used.peak, used.current  # x, its exponentials and y; x and y
        (8004, 4004)
    """
    device = torch.device(device)
    use = MemoryUse()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield use
        torch.cuda.synchronize(device)
        use.peak = torch.cuda.max_memory_allocated(device) - before
        use.current = torch.cuda.memory_allocated(device) - before
        return
    if device.type != "cpu":
        raise ValueError(f"memory is measured on the CPU and on CUDA devices, not on {device.type!r}")
    if torch._C._autograd._profiler_enabled():
        raise RuntimeError(
            "torch's profiler is running, and there can be one at a time: stop it before measure_memory()"
        )
    recorder = profiler.profile(profile_memory=True, use_kineto=True)
    with _without_notices():
        recorder.__enter__()
    start = resident_memory(reset_peak=True)
    try:
        yield use
    finally:
        stop = resident_memory()
        with _without_notices():
            recorder.__exit__(None, None, None)
    if start is not None and stop is not None:
        use.resident = stop[1] - start[0]
    use.peak, use.current = _follow(_allocations(recorder))


def _allocations(recorder: Any) -> list[tuple[int, int, int]]:
    """``(time, address, bytes)`` of each allocation (bytes > 0) and release on the CPU, in order of time."""
    found = []
    waiting = list(recorder.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    found.sort(key=lambda item: item[0])
    return found


def _follow(events: list[tuple[int, int, int]]) -> tuple[int, int]:
    """Peak and last value of what is held; addresses that were not seen to be allocated are of older blocks."""
    held: dict[int, int] = {}
    now = peak = 0
    for _, address, size in events:
        if size > 0:
            now += size - held.get(address, 0)
            held[address] = size
            peak = max(peak, now)
        else:
            now -= held.pop(address, 0)
    return peak, now


@contextmanager
def _without_notices() -> Iterator[None]:
    """The profiler tells of its start and stop on standard error, past Python: keep it off there."""
    try:
        saved = os.dup(2)
    except OSError:  # there is no standard error
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def resident_memory(*, reset_peak: bool = False) -> tuple[int, int] | None:
    """Bytes of main memory that this process has now, and the most it has had; None where the system does not say.

    Args:
        reset_peak: Whether the most begins anew from now (Linux lets a process do that for itself).
    """
    try:
        if reset_peak:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = {key: int(size) * 1024 for key, size in re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", status, re.MULTILINE)}
    return (found["VmRSS"], found["VmHWM"]) if len(found) == 2 else None
