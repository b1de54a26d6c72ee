"""What each of two processes does in `test_peft_distributed.py`, under torchrun with gloo."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from resu.integrations.peft import QRESUAdapterConfig, RESUAdapterConfig, SparseLoRAAdapterConfig
from tests.integrations.peft_models import TARGETS, adapted, example, masks, run

METHODS = {
    "resu": lambda: RESUAdapterConfig(sparsity=0.3, target_modules=TARGETS["llama"]),
    "qresu": lambda: QRESUAdapterConfig(sparsity=0.3, target_modules=TARGETS["llama"]),
    "lora": lambda: SparseLoRAAdapterConfig(r=3, dropout=0.0, masks=masks("llama"), target_modules=TARGETS["llama"]),
}


def gradients(model, outer):
    run(outer, example("llama")).square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}


def wrapped(model, way, mesh):
    if way == "ddp":
        return DistributedDataParallel(model)
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def main(folder):
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for method, config in METHODS.items():
        alone = adapted("llama", config())
        expected = gradients(alone, alone)
        for way in ("ddp", "fsdp2"):
            model = adapted("llama", config())
            found = gradients(model, wrapped(model, way, mesh))
            assert set(found) == set(expected)
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name], gradient)
            (folder / f"{method}-{way}-{dist.get_rank()}").touch()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
