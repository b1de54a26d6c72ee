"""What each of two processes does in `test_distributed.py`, under torchrun with gloo."""

from __future__ import annotations

import faulthandler
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from resu.integrations.driving import gathered_state, read_state, write_state
from resu.training import RESU, RigL, Sparsifier
from tests.integrations import test_accelerate, test_hf_trainer, test_lightning
from tests.integrations.runs import same_bits
from tests.training.helpers import batches, fit, mlp

RULE = RESU(sparsity=0.8, initial_sparsity=None, interval=2, end_step=10)


def agree(model: nn.Module, sparsifier: Sparsifier) -> None:
    """Every rank has the same weights and masks."""
    masks = {name: mask.checksum() for name, mask in sparsifier.masks.items()}
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (masks, [p.detach().numpy().tobytes() for p in model.parameters()]))
    assert all(one == found[0] for one in found)


def hf_trainer(folder: Path) -> None:
    callback = test_hf_trainer.SparsityCallback(RULE, save_masks=True)
    run = test_hf_trainer.trainer(folder, callback)
    run.train()
    agree(run.model, callback.sparsifier)
    again = test_hf_trainer.trainer(folder, test_hf_trainer.SparsityCallback(RULE), test_hf_trainer.tiny(seed=1))
    again.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    assert same_bits(run.model, again.model)


def accelerate(folder: Path) -> None:
    data = batches(24)[dist.get_rank() :: 2]
    accelerator, model, optimizer = test_accelerate.prepared()
    sparsifier = test_accelerate.prepare_sparsifier(accelerator, model, optimizer, RigL(sparsity=0.8, interval=2))
    assert isinstance(model, nn.parallel.DistributedDataParallel)
    test_accelerate.train(accelerator, model, optimizer, data[:5])
    accelerator.save_state(str(folder))
    test_accelerate.train(accelerator, model, optimizer, data[5:])
    agree(model, sparsifier)
    ended = [p.detach().clone() for p in model.parameters()]
    accelerator.wait_for_everyone()
    accelerator.load_state(str(folder))
    assert sparsifier.step == 5
    test_accelerate.train(accelerator, model, optimizer, data[5:])
    assert all(torch.equal(a, b) for a, b in zip(ended, model.parameters(), strict=True))


def lightning(folder: Path) -> None:
    def run(callback: Any, model: Any, *others: Any, **options: Any) -> None:
        data = test_lightning.Resumable()
        data.data = data.data[dist.get_rank() :: 2] * 2
        test_lightning.trainer([callback, *others], strategy="ddp", devices=2, **options).fit(model, data, **resume)

    model, callback, resume = test_lightning.module(), test_lightning.SparsityCallback(RULE), {}
    run(callback, model, test_lightning.saving(folder), enable_checkpointing=True)
    agree(model, callback.sparsifier)
    again, resume = test_lightning.module(seed=1), {"ckpt_path": folder / "step=5.ckpt", "weights_only": True}
    run(test_lightning.SparsityCallback(RULE), again)
    assert same_bits(model, again)


def sharded(folder: Path) -> None:
    """One file from what is sharded, and back into what is whole."""
    net = mlp()
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    sparsifier = Sparsifier(net, optimizer, RULE)
    fit(net, optimizer, batches(3))
    state, masks = gathered_state(sparsifier), sparsifier.masks
    if dist.get_rank() == 0:
        write_state(state, folder / "sparsifier.pt")
    dist.barrier()
    plain = mlp()
    other = Sparsifier(plain, torch.optim.SGD(plain.parameters(), lr=0.1), RULE)
    other.load_state_dict(read_state(folder / "sparsifier.pt"))
    assert (other.masks, other.step) == (masks, 3)
    fit(net, optimizer, batches(3))
    sparsifier.load_state_dict(read_state(folder / "sparsifier.pt"))
    assert (sparsifier.masks, sparsifier.step) == (masks, 3)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(150, exit=True)  # ranks that wait for each other say where, and end
    for work in (hf_trainer, accelerate, lightning, sharded):
        where = Path(sys.argv[1]) / work.__name__
        where.mkdir(exist_ok=True)
        work(where)
        (where / f"done{dist.get_rank()}").touch()
    dist.barrier()
    dist.destroy_process_group()
