"""The PEFT methods on a CUDA device: results of the CPU, merged and unmerged exactly, files for either."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import PeftModel, get_peft_model

from resu.integrations.peft import QRESUAdapterConfig, RESUAdapterConfig, SparseLoRAAdapterConfig
from tests.integrations.peft_models import IGNORED, TARGETS, base_model, example, masks, run, trained

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings(IGNORED)]
DEVICE = os.environ.get("RESU_TEST_DEVICE", "cuda")
CONFIGS = {
    "resu": lambda kind: RESUAdapterConfig(sparsity=0.3, target_modules=TARGETS[kind]),
    "qresu": lambda kind: QRESUAdapterConfig(sparsity=0.3, target_modules=TARGETS[kind]),
    "lora": lambda kind: SparseLoRAAdapterConfig(r=3, dropout=0.0, masks=masks(kind), target_modules=TARGETS[kind]),
}


def on_device(kind):
    return {name: tensor.to(DEVICE) for name, tensor in example(kind).items()}


def step(model, inputs):
    y = run(model, inputs)
    y.square().mean().backward()
    return y.detach().cpu(), {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("made_there", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "conv"])
@pytest.mark.parametrize("method", list(CONFIGS))
def test_as_on_the_cpu(method, kind, made_there, tmp_path):
    here = trained(get_peft_model(base_model(kind), CONFIGS[method](kind))).eval()
    here.save_pretrained(tmp_path)
    if made_there:
        there = PeftModel.from_pretrained(base_model(kind).to(DEVICE), tmp_path, is_trainable=True).eval()
    else:
        there = PeftModel.from_pretrained(base_model(kind), tmp_path, is_trainable=True).eval().to(DEVICE)
    assert {tensor.device.type for tensor in [*there.parameters(), *there.buffers()]} == {DEVICE}
    expected, gradients = step(here, example(kind))
    y, found = step(there, on_device(kind))
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)
    assert set(found) == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4)
    before = {name: tensor.clone() for name, tensor in there.state_dict().items()}
    there.merge_adapter()
    torch.testing.assert_close(run(there, on_device(kind)).cpu(), expected, rtol=1e-3, atol=1e-4)
    there.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in there.state_dict().items())
    there.save_pretrained(tmp_path / "again")
    back = PeftModel.from_pretrained(base_model(kind), tmp_path / "again", torch_device="cpu")
    torch.testing.assert_close(run(back, example(kind)), expected)
