"""`resu export`: each target, its report, refusals in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("typer")
pytest.importorskip("transformers")
import transformers

from resu import SparseMask
from resu.core.mask_files import write_masks
from resu.formats.stored import Stored
from resu.integrations.checkpoint import prune_checkpoint


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=48, **sizes)).save_pretrained(tmp_path / "dense")
    prune_checkpoint(tmp_path / "dense", tmp_path / "model", 0.5)
    return tmp_path / "model"


def test_pack_quantized(resu, model, tmp_path):
    result = resu("export", model, "--to", "pack-quantized", "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert result.stderr == ""
    for text in ("pack-quantized", "7 packed; sparsity 50.00 %", "per packed weight", "of a weight's norm", "lm_head"):
        assert text in result.stdout, result.stdout
    assert len(Stored.open(tmp_path / "out").quantized) == 7
    options = ("--group-size", 16, "--ignore", "*.mlp.*", "--ignore", "*.q_proj", "--force", "--json")
    result = resu("export", model, "--to", "pack-quantized", "--out", tmp_path / "out", *options)
    report = json.loads(result.stdout)
    assert report["packed"] == 3
    assert report["group_size"] == 16
    assert len(report["ignored"]) == 5
    assert 0 < report["error"]["mean"] <= report["error"]["max"] < 0.12


@pytest.mark.parametrize(("kind", "name"), [("bitmask", "sparse-bitmask"), ("dense", "dense")])
def test_layouts(resu, model, tmp_path, kind, name):
    result = resu("export", model, "--to", kind, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert f": {name}" in result.stdout
    before, after = Stored.open(model), Stored.open(tmp_path / "out")
    assert all(torch.equal(before.read(n)[0], after.read(n)[0]) for n in before.names)


def test_back_from_four_bits(resu, model, tmp_path):
    resu("export", model, "--to", "pack-quantized", "--out", tmp_path / "small")
    report = json.loads(resu("inspect", tmp_path / "small", "--json").stdout)
    assert sum(row.get("layout") == "pack-quantized" for row in report["tensors"]) == 7
    assert resu("validate", tmp_path / "small").exit_code == 0
    assert resu("export", tmp_path / "small", "--to", "dense", "--out", tmp_path / "back").exit_code == 0
    transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back")


def test_cerebras(resu, model, tmp_path):
    result = resu("export", model, "--cerebras", "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "sparsity.yaml" in result.stdout
    assert "from_zeros" in (tmp_path / "out/sparsity.yaml").read_text()
    assert not (tmp_path / "out/checkpoint_0.mdl").exists()
    resu("export", model, "--to", "cerebras", "--masks-as", "tensors", "--out", tmp_path / "out", "--force")
    state = torch.load(tmp_path / "out/checkpoint_0.mdl", weights_only=True)["model"]
    assert sum(name.endswith("_mask") for name in state) == 7


def test_onnx(resu, model, tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    result = resu("export", model, "--to", "onnx", "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert result.stderr == ""
    for text in ("onnx", "input_ids", "logits", "where the largest output is", "opset"):
        assert text in result.stdout
    assert (tmp_path / "out/model.onnx").is_file()


def test_onnx_says_what_it_needs(refused, model, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    line = refused("export", model, "--to", "onnx", "--out", tmp_path / "out")
    assert "pip install onnx onnxscript onnxruntime" in line
    assert not (tmp_path / "out").exists()


def test_nothing_is_replaced_unasked(resu, refused, model, tmp_path):
    call = ("export", model, "--to", "pack-quantized", "--out", tmp_path / "out")
    assert resu(*call).exit_code == 0
    assert "pass --force to replace" in refused(*call)
    assert resu(*call, "--force").exit_code == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    line = refused("export", model, "--to", "pack-quantized", "--out", tmp_path / "mine", "--force")
    assert "is no earlier result" in line


def test_refusals(refused, model, tmp_path):
    out = ("--out", tmp_path / "out")
    assert "say what to export to: --to pack-quantized" in refused("export", model, *out)
    assert "known: pack-quantized, bitmask" in refused("export", model, "--to", "gguf", *out)
    assert "two targets" in refused("export", model, "--to", "onnx", "--cerebras", *out)
    assert "--group-size is for pack-quantized, not for onnx" in refused(
        "export", model, "--to", "onnx", "--group-size", 8, *out
    )
    assert "--tolerance is for onnx" in refused("export", model, "--to", "dense", "--tolerance", 0.1, *out)
    assert "--masks-as is for cerebras" in refused("export", model, "--to", "dense", "--masks-as", "zeros", *out)
    assert "known: zeros, tensors" in refused("export", model, "--cerebras", "--masks-as", "bits", *out)
    assert "does not divide" in refused("export", model, "--to", "pack-quantized", "--group-size", 7, *out)
    assert "no config.json" in refused("export", tmp_path / "absent", "--to", "pack-quantized", *out)
    assert "must not be the source" in refused("export", model, "--to", "dense", "--out", model, "--force")
    refused("export", model, "--to", "dense")
    refused("export", "--to", "dense", *out)
    state = load_file(model / "model.safetensors")
    (tmp_path / "bare").mkdir()
    save_file(state, tmp_path / "bare" / "model.safetensors")
    assert "has no masks" in refused("export", tmp_path / "bare", "--cerebras", *out)
    name = next(n for n in state if n.endswith("q_proj.weight"))
    write_masks({name: SparseMask(state[name] < 0)}, tmp_path / "other.safetensors")
    line = refused("export", model, "--to", "pack-quantized", "--masks", tmp_path / "other.safetensors", *out)
    assert name in line
    assert not (tmp_path / "out").exists()
