"""What the processes of the distributed tests do; each function runs on every rank of a gloo group."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from resu.core.sharding import is_sharded, whole
from resu.training import (
    ACDC,
    MEST,
    RESU,
    SET,
    SNFS,
    STE,
    Algorithm,
    GraNet,
    Magnitude,
    RigL,
    Sparsifier,
    SRigL,
    TopKAST,
)

STEPS, BATCH = 24, 16

RULES: dict[str, tuple[Algorithm, dict[str, Any]]] = {
    "magnitude": (Magnitude(sparsity=0.8, interval=2, end_step=20), {"distribution": "global"}),
    "set": (SET(sparsity=0.8, interval=2), {}),
    "rigl": (RigL(sparsity=0.8, interval=2), {}),
    "rigl-2:4": (RigL(sparsity=0.5, interval=2), {"pattern": "2:4", "exclude": "4"}),
    "srigl": (SRigL(sparsity=0.8, interval=2), {"pattern": "row"}),
    "mest-soft": (MEST(sparsity=0.8, interval=2, soft=True, end_step=22), {}),
    "granet": (GraNet(sparsity=0.8, interval=2, end_step=20), {"distribution": "global"}),
    "ac-dc": (ACDC(sparsity=0.8, interval=2, end_step=20), {}),
    "snfs": (SNFS(sparsity=0.8, interval=2), {}),
    "top-kast": (TopKAST(sparsity=0.8, interval=2), {}),
    "sr-ste": (STE(sparsity=0.8, decay=1e-3), {}),
    "resu": (RESU(sparsity=0.8, interval=2, ramp_end_step=10, end_step=18), {"distribution": "global"}),
}


def network() -> nn.Sequential:
    """Its 43 rows divide evenly among neither 2 nor 4 ranks; 5 rows are fewer than 2 for each of 4."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 43), nn.ReLU(), nn.Linear(43, 40), nn.ReLU(), nn.Linear(40, 5))


def batch(step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 20, generator=generator)
    y = torch.randint(5, (BATCH,), generator=generator)
    return x.chunk(world)[rank], y.chunk(world)[rank]


class Run:
    """One model under one rule, alone or with others."""

    def __init__(self, rule: str, kind: str = "alone", frozen: bool = False) -> None:
        self.kind, self.model = kind, network()
        self.model[2].weight.requires_grad_(not frozen)  # type: ignore[operator,union-attr]
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if kind != "alone" else (0, 1)
        self.run: nn.Module = self.model
        if kind == "ddp":
            self.run = nn.parallel.DistributedDataParallel(self.model)
        elif kind != "alone":
            options: dict[str, Any] = {"mesh": init_device_mesh("cpu", (self.world,))}
            if kind == "hsdp":
                options["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
            if kind == "fsdp-bf16":
                options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            for module in (self.model[2], self.model):
                fully_shard(module, **options)
        self.optimizer = torch.optim.AdamW(self.run.parameters(), lr=1e-2, weight_decay=0.1)
        algorithm, options = RULES[rule]
        self.sparsifier = Sparsifier(self.run, self.optimizer, algorithm, **options)

    def go(self, begin: int = 0, end: int = STEPS, micro: int = 1) -> Run:
        for step in range(begin, end):
            self.optimizer.zero_grad()
            x, y = batch(step, self.rank, self.world)
            for i, (part, labels) in enumerate(zip(x.chunk(micro), y.chunk(micro), strict=True)):
                last = i == micro - 1
                wait = contextlib.nullcontext() if last or self.kind != "ddp" else self.run.no_sync()  # type: ignore[operator]
                with wait:
                    (nn.functional.cross_entropy(self.run(part), labels) / micro).backward()
            self.optimizer.step()
        return self

    def result(self) -> dict[str, Any]:
        """Masks, weights and counters, whole; every rank must ask."""
        return {
            "masks": {name: mask.mask for name, mask in self.sparsifier.masks.items()},
            "weights": {name: whole(p.detach()).clone() for name, p in self.model.named_parameters()},
            "report": self.sparsifier.report().as_dict(),
        }

    def checkpoint(self) -> dict[str, Any]:
        weights, state = get_state_dict(self.model, self.optimizer)
        return {"model": weights, "optimizer": state, "sparsifier": self.sparsifier.state_dict()}

    def resume(self, folder: Path) -> Run:
        state = self.checkpoint()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.sparsifier.load_state_dict(state["sparsifier"])
        return self


def assert_zeros_here(run: Run) -> None:
    """Pruned positions are +0.0 in the part of each weight that lies on this rank."""
    for name, held in run.sparsifier._held.items():
        pruned = held.constraint.mask.get_pruned(held.weight)
        assert torch.equal(pruned, torch.zeros_like(pruned)), name
        assert not torch.signbit(pruned).any(), name


def assert_same_everywhere(result: dict[str, Any]) -> None:
    packed = [mask.numpy().tobytes() for mask in result["masks"].values()]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, packed)
    assert all(other == packed for other in gathered)


# -- what ranks do -------------------------------------------------------------------------------------


def train_all(rank: int, folder: Path, kinds: list[str], rules: list[str]) -> None:
    world = dist.get_world_size()
    for kind in kinds:
        for rule in rules:
            run = Run(rule, kind).go()
            assert_zeros_here(run)
            result = run.result()
            assert_same_everywhere(result)
            if rank == 0:
                torch.save(result, folder / f"{kind}-{world}-{rule}.pt")


def accumulate(rank: int, folder: Path, kinds: list[str], rules: list[str]) -> None:
    for kind in kinds:
        for rule in rules:
            result = Run(rule, kind).go(micro=4).result()
            if rank == 0:
                torch.save(result, folder / f"{kind}-micro-{rule}.pt")


def freeze(rank: int, folder: Path, kinds: list[str], rules: list[str]) -> None:
    """A layer that is in no rank's loss of a step."""
    for kind in kinds:
        for rule in rules:
            result = frozen(rule, kind).go().result()
            if rank == 0:
                torch.save(result, folder / f"{kind}-frozen-{rule}.pt")


def frozen(rule: str, kind: str = "alone") -> Run:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "1 of . selected weights are frozen")
        return Run(rule, kind, frozen=True)


def save_at(rank: int, folder: Path, kinds: list[str], rules: list[str], cut: int) -> None:
    """Stop at ``cut``, save, go on; a second run that resumes there on as many ranks must be the same bit for bit."""
    for kind in kinds:
        for rule in rules:
            run = Run(rule, kind).go(0, cut)
            where = folder / f"checkpoint-{kind}-{rule}"
            dcp.save(run.checkpoint(), checkpoint_id=where)
            whole_run = run.go(cut).result()
            again = Run(rule, kind).resume(where).go(cut).result()
            for key in ("masks", "weights"):
                for name, value in whole_run[key].items():
                    assert torch.equal(value, again[key][name]), (kind, rule, key, name)
            assert whole_run["report"] == again["report"]
            if rank == 0:
                torch.save(whole_run, folder / f"{kind}-saved-{rule}.pt")


def resume_elsewhere(rank: int, folder: Path, kinds: list[str], rules: list[str], cut: int) -> None:
    """Go on from the checkpoints of :func:`save_at` with another number of ranks."""
    for kind in kinds:
        for rule in rules:
            run = Run(rule, kind).resume(folder / f"checkpoint-{kind}-{rule}").go(cut)
            assert_zeros_here(run)
            result = run.result()
            assert_same_everywhere(result)
            if rank == 0:
                torch.save(result, folder / f"{kind}-resumed-{rule}.pt")


def all_is_sharded(rank: int, folder: Path) -> None:
    run = Run("top-kast", "fsdp").go(0, 4)
    state = run.sparsifier.state_dict()
    for key in ("masks", "explored", "reach"):
        assert all(is_sharded(one["packed"]) for one in state[key].values()), key
    assert all(is_sharded(theta) for theta in state["theta"].values())
    rows = [held.constraint.mask.shape[0] for held in run.sparsifier._held.values()]
    assert rows == [len(part) for part in (torch.arange(n).chunk(dist.get_world_size())[rank] for n in (43, 40, 5))]


def disagree(rank: int, folder: Path) -> None:
    """Ranks that start from other weights are found out at the first update."""
    from resu.training.agreement import MaskMismatchError

    model = network()
    with torch.no_grad():
        model[0].weight.add_(rank)  # type: ignore[operator,union-attr]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(MaskMismatchError, match="different masks at step 0"):
        Sparsifier(model, optimizer, Magnitude(sparsity=0.8))
    assert not any(bool((p == 0).any()) for p in model.parameters())  # and nothing was pruned


def die(rank: int, folder: Path) -> None:
    """Rank 1 is gone before an update; rank 0 says so and does not hang."""
    from resu.training.agreement import LostRankError

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Sparsifier(model, optimizer, RigL(sparsity=0.8, interval=2))
    for step in range(4):
        if rank == 1 and step == 1:
            os._exit(0)
        x, y = batch(step)
        nn.functional.cross_entropy(model(x), y).backward()
        try:
            optimizer.step()
        except LostRankError as error:
            (folder / "said.txt").write_text(str(error))
            os._exit(0)
    raise AssertionError("not noticed")


def _start(
    rank: int, world: int, port: int, jobs: list[tuple[Callable[..., None], tuple[Any, ...]]], folder: Path
) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for function, arguments in jobs:
        function(rank, folder, *arguments)
    dist.barrier()
    # Not by the interpreter's end: threads of gloo that are still there then abort a process now and then.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def launch(world: int, folder: Path, *jobs: tuple[Callable[..., None], tuple[Any, ...]]) -> None:
    """Run jobs one after another on ``world`` processes; an error of any of them is raised here."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_start, (world, port, list(jobs), folder), nprocs=world)
