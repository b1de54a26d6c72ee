"""A model in main memory, pruned block by block on a CUDA device. ``RESU_TEST_DEVICE=cpu`` runs it elsewhere."""

import copy
import os

import pytest
import torch
from torch import nn

from resu.pruning.one_shot import prune_model

pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("RESU_TEST_DEVICE", "cuda")


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("where", ["model there", "model at home"])
def test_the_device_changes_next_to_nothing(method, where):
    model, x = encoder(), [torch.randn(4, 10, 32) for _ in range(3)]
    expected = prune_model(copy.deepcopy(model), 0.5, method, calibration=x)
    if where == "model there":
        model = model.to(DEVICE)
    home = next(model.parameters()).device
    result = prune_model(model, 0.5, method, calibration=x, device=DEVICE)
    assert all(p.device == home for p in model.parameters())
    assert all(m.device == home for m in result.masks.values())
    differing = sum(int((m.cpu() != expected.masks[n]).sum()) for n, m in result.masks.items())
    assert differing <= 0.02 * sum(m.numel() for m in result.masks.values())  # sums in another order
    assert all((model.get_parameter(n)[~m] == 0).all() for n, m in result.masks.items())
