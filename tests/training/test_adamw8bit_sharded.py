"""AdamW8bit over parameters that two processes share (FSDP2): each part is updated as if it were a parameter."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from resu.core.optimizer_state import clear_state
from resu.core.sharding import is_sharded, local, whole
from resu.training.adamw8bit import BLOCK, AdamW8bit
from tests.training.distributed_runs import launch


def parts_are_updated_alike(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(90, 13), nn.ReLU(), nn.Linear(13, 1)).bfloat16()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    twins = [nn.Parameter(local(p).clone()) for p in model.parameters()]
    options = {"lr": 1e-2, "weight_decay": 0.1, "seed": 3}
    optimizer, expected = AdamW8bit(model.parameters(), **options), AdamW8bit(twins, **options)
    for step in range(4):
        torch.manual_seed(step)
        model(torch.randn(6, 90, dtype=torch.bfloat16)).square().mean().backward()
        for p, twin in zip(model.parameters(), twins, strict=True):
            assert p.grad is not None
            twin.grad = local(p.grad).clone()
        if step == 2:  # a state that is loaded goes on alike
            state = optimizer.state_dict()
            optimizer = AdamW8bit(model.parameters(), **options)
            optimizer.load_state_dict(state)
            weight = model[0].weight
            held = torch.zeros(local(weight).shape, dtype=torch.bool)
            held[0, :3] = True
            clear_state(optimizer, weight, held)
            clear_state(expected, twins[0], held)
            assert not local(optimizer.state[weight]["exp_avg"])[0, :3].any()
        optimizer.step()
        expected.step()
        for p, twin in zip(model.parameters(), twins, strict=True):
            assert torch.equal(local(p), twin)
            ours, theirs = optimizer.state[p], expected.state[twin]
            for name in ("exp_avg", "exp_avg_sq"):
                assert is_sharded(ours[name])
                assert ours[name].shape == p.shape
                assert torch.equal(local(ours[name]), theirs[name])
                scales = ours[f"{name}_scale"]
                used = theirs[f"{name}_scale"].numel()
                assert torch.equal(local(scales)[:used], theirs[f"{name}_scale"])
                assert whole(scales).numel() == scales.numel() == 2 * local(scales).numel()
    assert local(optimizer.state[model[0].weight]["exp_avg_scale"]).numel() == -(-7 * 90 // BLOCK)
    assert local(model[2].weight).numel() == (13 if rank == 0 else 0)  # one rank has nothing of it
    (folder / f"done-{rank}").touch()


@pytest.mark.skipif(os.name != "posix", reason="gloo")
def test_each_part_is_updated_as_a_parameter_of_its_own(tmp_path: Path) -> None:
    launch(2, tmp_path, (parts_are_updated_alike, ()))
    assert {p.name for p in tmp_path.iterdir()} == {"done-0", "done-1"}
