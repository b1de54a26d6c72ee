"""Several processes that train one model: sums of gradients, and proof that all hold the same masks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from resu.core.mask import pack_bits

__all__ = ["Agreement", "LostRankError", "MaskMismatchError"]


class LostRankError(RuntimeError):
    """Another process of the run is gone."""


class MaskMismatchError(RuntimeError):
    """Processes of one run chose different masks."""


class Agreement:
    """The processes of a run; of one process, nothing here costs or does anything.

    Args:
        model: As the user gave it: the process group of a ``DistributedDataParallel`` wrapper is taken from it.
        group: The group to use instead; None: that of the wrapper, or all processes.
    """

    def __init__(self, model: nn.Module, group: Any = None) -> None:
        self.group: Any = None
        self.world = 1
        self._chosen = hashlib.sha256()
        if dist.is_available() and dist.is_initialized():
            wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
            own: Any = model.process_group if wrapped else dist.group.WORLD
            self.group = own if group is None else group
            self.world = dist.get_world_size(self.group)

    def mean_(self, gradient: Tensor) -> Tensor:
        """Average over the processes, in place."""
        if self.world > 1:
            with _loss_said():
                dist.all_reduce(gradient, group=self.group)
            gradient.div_(self.world)
        return gradient

    def note(self, mask: Tensor) -> None:
        """A mask that this process has chosen, for the next comparison."""
        if self.world > 1:
            self._chosen.update(pack_bits(mask).cpu().contiguous().numpy().tobytes())

    def check_same(self, step: int) -> None:
        """Compare a checksum of the masks noted since the last comparison over the processes.

        Raises:
            MaskMismatchError: If they differ.
        """
        if self.world == 1:
            return
        mine = torch.frombuffer(bytearray(self._chosen.digest()), dtype=torch.int64).clone()
        self._chosen = hashlib.sha256()
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        both = torch.cat([mine, -mine]).to(device)
        with _loss_said():
            dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self.group)
        # The largest and the smallest over all processes: equal exactly if all are.
        largest, smallest = both.cpu().split(mine.numel())
        if not torch.equal(largest, -smallest):
            raise MaskMismatchError(
                f"the processes chose different masks at step {step}: their weights or gradients differ; start from "
                "the same weights, wrap the model in DistributedDataParallel or fully_shard, and use one seed"
            )


@contextmanager
def _loss_said() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(
            f"another process of this run is gone ({str(error).splitlines()[0]}); start the run again from its last "
            "checkpoint"
        ) from error
