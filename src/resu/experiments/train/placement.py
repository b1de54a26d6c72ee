"""Where and how a network computes: device, precision, memory format, and the processes that share a batch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resu.core.ranks import Ranks, joined
from resu.experiments.train.config import Compute
from resu.experiments.train.typed import ConfigError

__all__ = ["Placement", "placed"]


@dataclass(frozen=True)
class Placement:
    """The device of this process, and how tensors get there.

    Attributes:
        device: Of this process.
        ranks: This process among those that share a batch.
    """

    device: torch.device
    precision: str
    channels_last: bool
    ranks: Ranks

    def inputs(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """A batch on the device, in the memory format of the run."""
        x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
        if self.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, y

    def model(self, model: nn.Module) -> nn.Module:
        """The model on the device, in the memory format of the run."""
        model = model.to(self.device)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context of a forward pass."""
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, on the device of ``values``."""
        if self.ranks.world == 1:
            return values
        moved = values.to(self.device)
        torch.distributed.all_reduce(moved)
        return moved.to(values.device)

    def share_buffers(self, model: nn.Module) -> None:
        """Give all processes the buffers of the first: norms over a batch have seen another slice in each."""
        if self.ranks.world > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)


@contextlib.contextmanager
def placed(compute: Compute) -> Iterator[Placement]:
    """The placement that a configuration asks for, for the time of a run.

    The number of threads and the global random state are as before afterwards; a process group that ``torchrun`` asks
    for is made and taken down.

    Raises:
        ConfigError: If there is no such device, or several processes are not wanted.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and compute.parallel == "none":
        raise ConfigError(f"compute.parallel is none, and {world} processes were started; set it to ddp, or start one")
    device = _device(compute.device)
    threads = torch.get_num_threads()
    devices = [device] if device.type == "cuda" else []
    with _group(device, world), joined() as ranks, torch.random.fork_rng(devices):
        if compute.threads is not None:
            torch.set_num_threads(compute.threads)
        try:
            yield Placement(device, compute.precision, compute.channels_last, ranks)
        finally:
            torch.set_num_threads(threads)


@contextlib.contextmanager
def _group(device: torch.device, world: int) -> Iterator[None]:
    """The process group of a run under ``torchrun``, unless there is one."""
    if world == 1 or torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
        torch.distributed.barrier()  # a process that is done must not take the group from one that is not
    finally:
        torch.distributed.destroy_process_group()


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"compute.device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("compute.device is cuda, and torch sees no GPU; leave it at auto, or take cpu")
        index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", "0"))
        if index >= torch.cuda.device_count():
            raise ConfigError(f"compute.device asks for GPU {index}, and torch sees {torch.cuda.device_count()}")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device
