"""What is written as pack-quantized is what compressed-tensors of today reads, alone and through transformers.

To run the tests against it:

    pip install --no-deps --target FOLDER compressed-tensors loguru
    RESU_COMPRESSED_TENSORS_NOW=FOLDER pytest tests/formats/test_pack_quantized_compat.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from resu.formats.pack_quantized import pack_quantized, quantization_config, unpack_quantized
from resu.integrations.checkpoint import prune_checkpoint
from resu.integrations.convert import convert
from tests.integrations.conftest import stories  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Runs compressed_tensors_now.py; skipped where the library is absent."""
    folder = os.environ.get("RESU_COMPRESSED_TENSORS_NOW")
    if folder is None:
        pytest.skip("compressed-tensors of today is absent (RESU_COMPRESSED_TENSORS_NOW: see the top of this file)")
    path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    script = Path(__file__).with_name("compressed_tensors_now.py")

    def run(command, source):
        target = tmp_path_factory.mktemp(command)
        call = [sys.executable, "-W", "ignore", script, command, source, target]
        done = subprocess.run(call, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return target

    return run


def test_weights_decompress_there_to_the_same_bits(library, tmp_path):
    written = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for columns, group_size in ((40, None), (37, None), (40, 8), (39, 13)):
            weight = torch.randn(9, columns).to(dtype)
            weight[torch.rand(weight.shape) < 0.5] = 0
            weight[3] = 0
            weight[4] *= 1e-3
            name = f"{str(dtype).removeprefix('torch.')}-{columns}-{group_size}"
            written[name] = weight, pack_quantized(weight, group_size)
            save_file(written[name][1], tmp_path / f"{name}.safetensors")
            scheme = quantization_config([], group_size)["config_groups"]["group_0"]
            (tmp_path / f"{name}.json").write_text(json.dumps(scheme))
    target = library("weights", tmp_path)
    for name, (weight, parts) in written.items():
        found = load_file(target / f"{name}.safetensors")
        assert torch.equal(found["weight"], unpack_quantized(parts)), name
        assert (found["weight"][weight == 0] == 0).all(), name
        # Packed there again from what it has read, with the same scales: the same words, padding included.
        assert torch.equal(found["again"], parts["weight_packed"]), name


def test_models_load_in_transformers_with_our_weights(library, stories, tmp_path):  # noqa: F811
    transformers = pytest.importorskip("transformers")
    from resu.integrations.hf import load_model
    from resu.integrations.quantize import write_pack_quantized

    pruned, packed = tmp_path / "pruned", tmp_path / "packed"
    pruned.mkdir()
    packed.mkdir()
    (tmp_path / "rounded").mkdir()
    prune_checkpoint(stories, pruned / "causal", 0.5)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(
        vocab_size=40, num_labels=3, architectures=["BertForSequenceClassification"], **sizes
    )
    transformers.BertForSequenceClassification(config).bfloat16().save_pretrained(tmp_path / "bert")
    prune_checkpoint(tmp_path / "bert", pruned / "classification", 0.5)
    write_pack_quantized(pruned / "causal", packed / "causal")
    write_pack_quantized(pruned / "causal", packed / "groups", group_size=4)
    write_pack_quantized(pruned / "classification", packed / "classification", ignore="classifier")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=3, **sizes)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    prune_checkpoint(tmp_path / "moe", pruned / "experts", 0.5)
    write_pack_quantized(pruned / "experts", packed / "experts")
    target = library("models", packed)
    ids = torch.arange(3, 27).view(2, 12)
    for name in ("causal", "groups", "classification", "experts"):
        convert(packed / name, tmp_path / "rounded" / name, "dense")
        before, _ = load_model(pruned / ("causal" if name == "groups" else name))
        after, _ = load_model(tmp_path / "rounded" / name)
        with torch.no_grad():
            unrounded, expected = before(input_ids=ids)[0], after(input_ids=ids)[0]
        assert not torch.equal(unrounded, expected)
        for way, found in load_file(target / f"{name}.safetensors").items():
            assert torch.equal(found, expected), (name, way)
