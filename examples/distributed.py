"""Sparse training sharded over processes (FSDP2), with a checkpoint that any number of processes resumes from.

python examples/distributed.py                              # one process
torchrun --nproc-per-node 2 examples/distributed.py         # two; the same masks
torchrun --nproc-per-node 4 examples/distributed.py         # four go on from the checkpoint of two
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from resu.training import RigL, Sparsifier

STEPS, BATCH, CHECKPOINT = 60, 64, Path("checkpoint")


def main():
    if "RANK" not in os.environ:  # not started by torchrun
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4)).to(device)
    mesh = init_device_mesh(device, (world,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    # After fully_shard and the optimizer: masks are sharded with their weights, choices are made from all of them.
    sparsifier = Sparsifier(model, optimizer, RigL(sparsity=0.9, interval=5, end_step=50))

    def state():
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments, "sparsifier": sparsifier.state_dict()}

    if CHECKPOINT.exists():
        saved = state()
        dcp.load(saved, checkpoint_id=CHECKPOINT)
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        sparsifier.load_state_dict(saved["sparsifier"])

    begin = sparsifier.step
    for step in range(begin, STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, 32, generator=generator)
        y = x[:, :4].argmax(1)
        x, y = x.chunk(world)[rank].to(device), y.chunk(world)[rank].to(device)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if step + 1 == STEPS // 2:
            dcp.save(state(), checkpoint_id=CHECKPOINT)

    masks = sparsifier.masks  # gathered, so every process asks
    if rank == 0:
        print(f"{world} process(es), steps {begin} to {STEPS}, loss {loss.item():.3f}, sparsity {sparsifier.sparsity}")
        print("masks", {name: mask.checksum()[:8] for name, mask in masks.items()})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
