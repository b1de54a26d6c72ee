"""sparse_to_sparse is PERP's MaskLoRA, step by step; what scale changes of its ScaleLoRA, and why."""

import torch
from torch import nn
from torch.nn import functional as F

from resu.pruning.sparse_lora import apply_sparse_lora, lora_parameters
from tests.pruning.lora_models import config
from tests.reference import perp


def _data():
    torch.manual_seed(0)
    return torch.randn(32, 12, dtype=torch.float64), torch.randn(32, 8, dtype=torch.float64)


def test_training_is_mask_lora():
    x, y = _data()
    plain = nn.Linear(12, 8, bias=False).double()
    mask = torch.rand(8, 12) > 0.6
    weight = torch.where(mask, plain.weight.detach().clone(), 0)
    layer = apply_sparse_lora(plain, {"weight": mask}, config(r=4, alpha=6, dropout=0.0, target_modules="Linear"))
    a, b = (f["default"].detach().clone().requires_grad_() for f in (layer.lora_A, layer.lora_B))
    ours, theirs = torch.optim.SGD(lora_parameters(layer), lr=0.3), torch.optim.SGD([a, b], lr=0.3)
    for _ in range(20):
        for optimizer, output in (
            (ours, lambda: layer(x)),
            (theirs, lambda: F.linear(x, perp.mask_lora(weight, mask, a, b, 6 / 4))),
        ):
            optimizer.zero_grad()
            (output() - y).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(layer.lora_A["default"], a)
    torch.testing.assert_close(layer.lora_B["default"], b)
    layer.merge()
    torch.testing.assert_close(layer.weight.detach(), perp.mask_lora(weight, mask, a, b, 6 / 4).detach())


def test_scale_uses_its_rank_and_scale_lora_does_not():
    x, y = _data()
    weight = nn.Linear(12, 8, bias=False).double().weight.detach()
    a, b = (t.double().requires_grad_() for t in perp.scale_lora_start(4, 8, 12))
    optimizer = torch.optim.Adam([a, b], lr=0.05)
    torch.testing.assert_close(perp.scale_lora(weight, a, b), weight)  # both start as the weight they are given
    layer = nn.Linear(12, 8, bias=False).double()
    layer.weight.data.copy_(weight)
    everything = {"weight": torch.ones(8, 12, dtype=torch.bool)}
    layer = apply_sparse_lora(layer, everything, config("scale", r=4, dropout=0.0, target_modules="Linear"))
    ours = torch.optim.Adam(lora_parameters(layer), lr=0.05)
    torch.testing.assert_close(layer.effective_weight(), weight)
    for _ in range(200):
        for its, output in ((optimizer, lambda: F.linear(x, perp.scale_lora(weight, a, b))), (ours, lambda: layer(x))):
            its.zero_grad()
            loss = (output() - y).square().mean()
            loss.backward()
            its.step()
    assert torch.linalg.matrix_rank(b @ a) == 1
    ratio = layer.effective_weight() / weight - 1
    assert torch.linalg.matrix_rank(ratio, rtol=1e-6) == 4
