"""Sparse LoRA on a CUDA device. ``RESU_TEST_DEVICE=cpu`` runs it elsewhere, to check the tests themselves."""

from __future__ import annotations

import os
import warnings

import pytest
import torch

from resu.core.peak_memory import measure_memory
from resu.pruning.sparse_lora import (
    apply_sparse_lora,
    get_lora_layers,
    lora_parameters,
    merge_all_lora_weights,
    unmerge_all_lora_weights,
    validate_sparsity_preserved,
)
from tests.pruning.lora_models import MODES, adapted, batch, config, same_bits

pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("RESU_TEST_DEVICE", "cuda")


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_the_same_as_on_the_cpu(mode: str, dtype: torch.dtype, bits: int | None) -> None:
    results = []
    for device in ("cpu", DEVICE):
        model, masks = adapted(mode, dtype, ("a", "b"), base_bits=bits, dropout=0.0)
        model[1] = torch.nn.Tanh()  # a ReLU near 0 flips when something is rounded another way
        model.to(device)
        x = batch(dtype).to(device).requires_grad_()
        y = model(x)
        y.float().square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in lora_parameters(model))])
        before = {name: layer.weight.detach().clone() for name, layer in get_lora_layers(model).items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "sparse_to_dense")
            merge_all_lora_weights(model)
        assert validate_sparsity_preserved(model, masks, 0)[0]
        unmerge_all_lora_weights(model)
        assert same_bits({n: layer.weight.detach().clone() for n, layer in get_lora_layers(model).items()}, before)
    for cpu, here in zip(*results, strict=True):
        scale = float(cpu.float().abs().max()) + 1e-6
        limit = 1e-4 if dtype == torch.float32 else 5e-2
        assert float((cpu.float() - here.cpu().float()).abs().max()) <= limit * scale


def test_one_step_keeps_no_dense_weight() -> None:
    width = 8192 if DEVICE == "cuda" else 2048
    layer = torch.nn.Linear(width, width, bias=False, device=DEVICE)
    layer = apply_sparse_lora(layer, None, config(target_modules="Linear", dropout=0.0))
    x = torch.randn(4, width, device=DEVICE)
    for _ in range(2):  # first use: tables and workspaces
        layer(x).square().sum().backward()
        layer.zero_grad()
    with measure_memory(DEVICE) as used:
        layer(x).square().sum().backward()
    assert used.peak < 0.75 * 4 * width * width
