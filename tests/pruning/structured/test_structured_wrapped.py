"""Models wrapped for several processes are refused: the wrapper would go on with the parameters that are gone."""

import pytest
import torch
from torch import distributed as dist
from torch import nn

from resu.pruning.structured import BlockPruner, StructuredPruner, remove_blocks, shrink_tensors

X = torch.zeros(2, 4)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.inner(x)


def net():
    return nn.Sequential(nn.Linear(4, 8), Residual(), nn.ReLU(), nn.Linear(8, 2))


@pytest.fixture
def group():
    if not dist.is_available():
        pytest.skip("torch is built without torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def attempts(model, name):
    rows = {f"{name}0.weight": {0: torch.arange(4)}}
    return {
        "channels": lambda: StructuredPruner(0.5, X).prune(model),
        "blocks": lambda: BlockPruner(0.5, X, calibration=[X]).prune(model),
        "by hand": lambda: shrink_tensors(model, rows),
        "blocks by hand": lambda: remove_blocks(model, [f"{name}1"]),
    }


@pytest.mark.parametrize("way", ["channels", "blocks", "by hand", "blocks by hand"])
def test_data_parallel_is_refused_with_what_to_do(group, way):
    model = nn.parallel.DistributedDataParallel(net())
    before = list(model.parameters())
    with pytest.raises(ValueError, match=r"make model\.module smaller in every process"):
        attempts(model, "module.")[way]()
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    inside = nn.Sequential(nn.Linear(4, 4), model)
    with pytest.raises(ValueError, match=r"make 1\.module smaller"):
        attempts(inside, "1.module.")[way]()
    # What it says works, and is a model that trains.
    StructuredPruner(0.5, X).prune(model.module)
    again = nn.parallel.DistributedDataParallel(model.module)
    again(X + 1).sum().backward()
    assert again.module[0].weight.grad.shape == again.module[0].weight.shape


@pytest.mark.parametrize("way", ["channels", "blocks", "by hand", "blocks by hand"])
def test_divided_parameters_are_refused(group, way):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="is divided over processes"):
        attempts(model, "")[way]()
