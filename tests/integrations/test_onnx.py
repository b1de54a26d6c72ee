"""ONNX files in ONNX Runtime: outputs of the model at other sizes, zeros kept, refusals, nothing half-written."""

import json

import pytest
import torch
from torch import nn

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
import onnx
import onnxruntime
from onnx import numpy_helper

from resu import convert_to_resu
from resu.integrations.checkpoint import prune_checkpoint
from resu.integrations.onnx import check_onnx, export_onnx

# Its own uses of what PyTorch and numpy will drop.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:onnx")


def run(path, **inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(found) for found in session.run(None, {k: v.numpy() for k, v in inputs.items()})]


def weights(path):
    graph = onnx.load(str(path)).graph
    return {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}


def test_a_sparse_network_of_any_batch(tmp_path):
    torch.manual_seed(0)
    model = convert_to_resu(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
    )
    model[0].prune_by_magnitude(0.5)
    model[4].prune_by_magnitude(0.9)
    model.train()
    report = export_onnx(model, torch.randn(2, 3, 6, 6), tmp_path / "net.onnx", output_names=["scores"])
    assert model.training
    assert model[1].training
    assert report["inputs"] == {"input": ["batch", 3, 6, 6]}
    assert report["outputs"] == {"scores": ["batch", 5]}
    assert report["error"] <= 1e-5 * report["largest"]
    assert report["bytes"] == (tmp_path / "net.onnx").stat().st_size
    model.eval()
    for rows in (1, 7):
        x = torch.randn(rows, 3, 6, 6)
        torch.testing.assert_close(run(tmp_path / "net.onnx", input=x)[0], model(x), rtol=1e-4, atol=1e-5)
    stored = weights(tmp_path / "net.onnx")
    linear = next(w for w in stored.values() if sorted(w.shape) == [5, 128])
    assert torch.equal(linear if linear.shape == (5, 128) else linear.T, model[4].weight)
    assert int((linear == 0).sum()) == 576
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


class Pair(nn.Module):
    """Two inputs by name, a mapping with a tuple as output."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, left, right):
        return {"sum": self.fc(left) + self.fc(right), "parts": (self.fc(left), right * 2)}


def test_named_inputs_and_nested_outputs(tmp_path):
    model, inputs = Pair(), {"left": torch.randn(2, 5, 4), "right": torch.randn(2, 5, 4)}
    report = export_onnx(model, inputs, tmp_path / "pair.onnx", dynamic={0: "batch", 1: "time"})
    assert report["inputs"] == {"left": ["batch", "time", 4], "right": ["batch", "time", 4]}
    assert len(report["outputs"]) == 3
    other = {name: torch.randn(3, 2, 4) for name in inputs}
    for mine, theirs in zip(
        run(tmp_path / "pair.onnx", **other), [model(**other)["sum"], *model(**other)["parts"]], strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    fixed = export_onnx(model, inputs, tmp_path / "fixed.onnx", dynamic={})
    assert fixed["inputs"] == {"left": [2, 5, 4], "right": [2, 5, 4]}


def test_refusals(tmp_path):
    model, path = nn.Linear(4, 2), tmp_path / "m.onnx"
    export_onnx(model, torch.randn(2, 4), path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export_onnx(model, torch.randn(2, 4), path)
    with pytest.raises(FileNotFoundError, match="make it first"):
        export_onnx(model, torch.randn(2, 4), tmp_path / "no" / "m.onnx")
    with pytest.raises(TypeError, match="example_inputs"):
        export_onnx(model, [3], tmp_path / "n.onnx")
    with pytest.raises(ValueError, match="1 inputs have 2 names"):
        export_onnx(model, torch.randn(2, 4), tmp_path / "n.onnx", input_names=["a", "b"])
    layer = convert_to_resu(nn.Sequential(nn.Linear(8, 8)))
    layer[0].prune_by_magnitude(0.5)
    layer[0].enter_qresu_mode()
    with pytest.raises(ValueError, match=r"0 is in QRESU mode.*exit_qresu_mode"):
        export_onnx(layer, torch.randn(2, 8), tmp_path / "n.onnx")

    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x  # depends on data

    with pytest.raises(ValueError, match="Branch cannot be exported to ONNX"):
        export_onnx(Branch(), torch.randn(2, 4), path, overwrite=True)

    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    with pytest.raises(ValueError, match=r"tolerance is 0\.0001"):
        export_onnx(Noise(), torch.randn(2, 4), path, overwrite=True)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    with pytest.raises(ValueError, match="output 0 is"):
        check_onnx(path, {"input": torch.randn(2, 4)}, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="outputs must be tensors, got a int"):
        check_onnx(path, {"input": torch.randn(2, 4)}, [1])


KINDS = {
    "LlamaForCausalLM": ("LlamaConfig", {"num_key_value_heads": 2}),
    "GPT2LMHeadModel": ("GPT2Config", {}),
    "BertForSequenceClassification": ("BertConfig", {"num_labels": 3}),
    "DistilBertForMaskedLM": ("DistilBertConfig", {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_hugging_face_folders(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    from resu.integrations.hf_onnx import write_onnx

    torch.manual_seed(0)
    config, options = KINDS[kind]
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    model = getattr(transformers, kind)(getattr(transformers, config)(vocab_size=64, **sizes, **options))
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.txt").write_text("beside")
    prune_checkpoint(tmp_path / "dense", tmp_path / "pruned", 0.5)
    report = write_onnx(tmp_path / "pruned", tmp_path / "onnx")
    assert report["error"] <= 1e-5 * report["largest"]
    assert {tuple(shape) for shape in report["inputs"].values()} == {("batch", "sequence")}
    assert set(report["inputs"]) >= {"input_ids", "attention_mask"}
    assert ("token_type_ids" in report["inputs"]) == ("Bert" in kind and "Distil" not in kind)
    assert next(iter(report["outputs"].values()))[0] == "batch"
    names = {p.name for p in (tmp_path / "onnx").iterdir()}
    assert names == {"model.onnx", "config.json", "pruning.json", "tokenizer.txt"} | (
        names & {"generation_config.json"}
    )
    assert json.loads((tmp_path / "onnx" / "pruning.json").read_text())["layout"] == "onnx"
    model = getattr(transformers, kind).from_pretrained(tmp_path / "pruned").eval()
    inputs = {name: torch.ones(4, 21, dtype=torch.int64) for name in report["inputs"]}
    inputs["input_ids"] = torch.randint(64, (4, 21))
    if "token_type_ids" in inputs:
        inputs["token_type_ids"][:, :9] = 0
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(run(tmp_path / "onnx" / "model.onnx", **inputs)[0], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(FileExistsError):
        write_onnx(tmp_path / "pruned", tmp_path / "onnx")
    write_onnx(tmp_path / "pruned", tmp_path / "onnx", overwrite=True)


def test_models_that_take_other_things_are_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    from resu.integrations.hf_onnx import write_onnx

    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="T5ForConditionalGeneration; exported are models of text"):
        write_onnx(tmp_path / "t5", tmp_path / "onnx")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes)).save_pretrained(tmp_path / "dense")
    prune_checkpoint(tmp_path / "dense", tmp_path / "bits", 0.5, layout="bitmask")
    with pytest.raises(ValueError, match=r"in the layout sparse-bitmask; make it dense first: resu export"):
        write_onnx(tmp_path / "bits", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
