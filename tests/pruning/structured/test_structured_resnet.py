"""A trained ResNet-20, half of its multiply-adds removed."""

import torch

from resu.experiments.models import load_resnet
from resu.pruning.structured.files import load_shrunk, save_shrunk
from resu.pruning.structured.pruner import StructuredPruner
from resu.pruning.structured.removal import mask_tensors
from resu.pruning.structured.sizes import count_macs, latencies
from resu.pruning.structured.verify import compare, double_copy, random_like


def test_half_the_multiply_adds_of_resnet20(tmp_path, data_folder):
    path = data_folder("model_resnet_cifar10") / "resnet20.npz"
    model, x = load_resnet(path), torch.randn(1, 3, 32, 32)
    dense, whole = load_resnet(path), count_macs(model, x)
    masked = double_copy(model)
    result = StructuredPruner(0.5, x, target="macs").prune(model)
    mask_tensors(masked, result.slices)
    assert compare(masked, double_copy(model), random_like(x, torch.Generator().manual_seed(7)), 1e-9)
    assert 0.475 * whole <= count_macs(model, x) <= 0.5 * whole
    assert not result.refused
    assert result.units["conv1"][1] < 16  # the residual stream too
    save_shrunk(model, tmp_path / "small", kept=result.slices)
    again = load_shrunk(load_resnet(path), tmp_path / "small")
    assert torch.equal(again(x), model(x))
    assert latencies([dense, model], x, rounds=3, seconds=0.005).ratios[0] == 1.0
