"""Model folders as pack-quantized: which layers, shards, ties, masks, errors, and back."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")
import transformers

from resu import convert_to_resu
from resu.core.mask_files import read_masks
from resu.core.shards import Shards
from resu.formats.compressed import read_compressed
from resu.formats.pack_quantized import pack_quantized, unpack_int4, unpack_quantized
from resu.formats.stored import Stored
from resu.integrations.checkpoint import prune_checkpoint
from resu.integrations.convert import convert
from resu.integrations.hf import load_model
from resu.integrations.quantize import write_pack_quantized
from resu.integrations.shrink.transform import shrink_transformer
from resu.modules.convert import get_resu_modules


@pytest.fixture
def llama(tmp_path):
    """A pruned causal model in bfloat16, in several shards, its head tied or not."""

    def make(tied=True, name="pruned", **options):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        config = transformers.LlamaConfig(vocab_size=64, tie_word_embeddings=tied, **sizes)
        model = transformers.LlamaForCausalLM(config).bfloat16()
        model.save_pretrained(tmp_path / f"{name}-dense", max_shard_size="12KB")
        (tmp_path / f"{name}-dense" / "tokenizer.txt").write_text("beside")
        prune_checkpoint(tmp_path / f"{name}-dense", tmp_path / name, 0.5, **options)
        return tmp_path / name

    return make


def test_sizes_that_no_configuration_can_say_are_refused(tmp_path):
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = transformers.BertModel(config)
    shrink_transformer(model, heads=0.5)
    model.save_pretrained(tmp_path / "smaller")
    with pytest.raises(ValueError, match="resu_shrunk"):
        write_pack_quantized(tmp_path / "smaller", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", ["dense", "bitmask"])
def test_every_linear_layer_but_the_head(llama, tmp_path, tied, layout):
    source, out = llama(tied, layout=layout), tmp_path / "packed"
    seen = []
    report = write_pack_quantized(source, out, progress=lambda *what: seen.append(what))
    before, after = Stored.open(source), Stored.open(out)
    assert len(after.quantized) == report["packed"] == 14
    assert all(name.endswith("_proj.weight") for name in after.quantized)
    assert set(after.names) == set(before.names)
    assert len(after.shards.files) == len(before.shards.files) > 1
    assert (
        json.loads((out / "model.safetensors.index.json").read_text())["weight_map"].keys()
        == after.shards.entries.keys()
    )
    for name in before.names:
        weight, found = before.read(name)[0], after.read(name)[0]
        expected = unpack_quantized(pack_quantized(weight)) if name in after.quantized else weight
        assert torch.equal(found, expected), name
        if name in after.quantized:
            assert (found[weight == 0] == 0).all()
    assert report["ignored"] == ["lm_head"]
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert config["tie_word_embeddings"] is tied
    assert (out / "tokenizer.txt").read_text() == "beside"
    assert read_masks(out / "masks.safetensors")[0] == read_masks(source / "masks.safetensors")[0]
    assert seen[-1][:2] == (len(before.names),) * 2
    # Weights of 32 and 48 columns: 4 bits a weight and 16 of a scale a row, and the shape.
    assert 4.3 < report["bits"] < 4.7
    largest = max(report["error"]["max"], report["error"]["mean"])
    assert report["error"]["max"] == largest < 0.12
    change = (after.read(report["error"]["worst"])[0] - before.read(report["error"]["worst"])[0]).double().norm()
    assert report["error"]["max"] == pytest.approx(
        float(change / before.read(report["error"]["worst"])[0].double().norm())
    )


def test_back_to_dense_and_to_bitmask(llama, tmp_path):
    source = llama()
    write_pack_quantized(source, tmp_path / "packed", group_size=16)
    packed, _, _ = read_compressed(tmp_path / "packed")
    for layout in ("dense", "bitmask"):
        convert(tmp_path / "packed", tmp_path / layout, layout)
        back, _, _ = read_compressed(tmp_path / layout)
        assert back.keys() == packed.keys()
        assert all(torch.equal(back[name], packed[name]) for name in packed)
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert Stored.open(tmp_path / "bitmask").packed.keys() == Stored.open(tmp_path / "packed").quantized.keys()
    model, _ = load_model(tmp_path / "dense")  # transformers reads it as a plain model
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, packed["model.layers.0.mlp.up_proj.weight"])
    # Packed again, nothing changes: each weight is one of the 16 values already.
    again = write_pack_quantized(tmp_path / "packed", tmp_path / "again", group_size=16)
    twice, _, _ = read_compressed(tmp_path / "again")
    assert again["error"]["max"] < 0.07
    assert all((twice[name][packed[name] == 0] == 0).all() for name in packed)


def test_encoders_whose_files_lack_the_prefix_and_layers_left_out(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=40, num_labels=3, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "dense")
    report = write_pack_quantized(tmp_path / "dense", tmp_path / "packed", ignore=["classifier", "*.pooler.dense"])
    assert report["ignored"] == ["bert.pooler.dense", "classifier"]
    assert report["packed"] == 6
    assert report["total"]["numel"] == 0  # no masks: a dense model may be packed too
    assert not (tmp_path / "packed" / "masks.safetensors").exists()
    # The encoder alone, saved under names without "bert.", but announced as the whole.
    model = transformers.BertForSequenceClassification(config)
    model.bert.save_pretrained(tmp_path / "encoder")
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    assert config["architectures"] == ["BertModel"]
    (tmp_path / "encoder" / "config.json").write_text(
        json.dumps({**config, "architectures": ["BertForSequenceClassification"]})
    )
    report = write_pack_quantized(tmp_path / "encoder", tmp_path / "packed-encoder")
    assert report["packed"] == 7
    assert report["ignored"] == ["classifier"]  # it is not in the file


def test_experts_stored_one_by_one(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    more = {"num_key_value_heads": 2, "num_experts": 3, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    config = transformers.Qwen2MoeConfig(vocab_size=64, shared_expert_intermediate_size=16, **sizes, **more)
    transformers.Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "dense")
    report = write_pack_quantized(tmp_path / "dense", tmp_path / "packed")
    packed = Stored.open(tmp_path / "packed").quantized
    assert sum(".experts." in name for name in packed) == 9
    assert len(packed) == report["packed"] == 9 + 4 + 3
    assert report["ignored"] == ["model.layers.0.mlp.shared_expert_gate", "lm_head"]
    assert not any("gate.weight" in name for name in packed)
    with pytest.raises(ValueError, match=r"experts\.0\.down_proj.*cannot stay dense"):
        write_pack_quantized(tmp_path / "dense", tmp_path / "other", ignore="*.experts.*")


def test_layers_that_are_no_linear_stay_dense(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="no weight to store as pack-quantized"):
        write_pack_quantized(tmp_path / "gpt2", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_refusals(llama, tmp_path):
    source, out = llama(), tmp_path / "packed"
    with pytest.raises(ValueError, match=re.escape("group_size 32 does not divide 48 columns")):
        write_pack_quantized(source, out, group_size=32)
    with pytest.raises(ValueError, match="nothing_like_this"):
        write_pack_quantized(source, out, ignore="nothing_like_this")
    with pytest.raises(ValueError, match="must not be the source"):
        write_pack_quantized(source, source)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        write_pack_quantized(source / "model-00001-of-00002.safetensors", out)
    out.mkdir()
    (out / "mine.txt").touch()
    for overwrite in (False, True):
        with pytest.raises(FileExistsError):
            write_pack_quantized(source, out, overwrite=overwrite)
    (out / "mine.txt").unlink()
    write_pack_quantized(source, out)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_pack_quantized(source, out)
    write_pack_quantized(source, out, overwrite=True)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match=r"quantized already \(gptq\)"):
        write_pack_quantized(source, tmp_path / "other")
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    with pytest.raises(ValueError, match="NoSuchModel"):
        write_pack_quantized(source, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_damaged_weight_and_nan_leave_nothing(llama, tmp_path):
    source = llama()
    file = sorted(Path(source).glob("model-*.safetensors"))[0]
    entry = next(e for n, e in Shards.open(source).entries.items() if e.file == file.name and len(e.shape) == 2)
    data = bytearray(file.read_bytes())
    data[entry.start] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        write_pack_quantized(source, tmp_path / "packed")
    dense = tmp_path / "pruned-dense"
    file = sorted(dense.glob("model-*.safetensors"))[-1]
    state = load_file(file)
    name = next(n for n in state if n.endswith("_proj.weight"))
    state[name][0, 0] = float("nan")
    save_file(state, file)
    with pytest.raises(ValueError, match=re.escape(f"'{name}' cannot be stored as pack-quantized")):
        write_pack_quantized(dense, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    assert not list(tmp_path.glob(".packed*"))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("commit", [True, False])
def test_a_merged_resurrection_run(llama, tmp_path, bits, commit):
    """QRESU, merged and saved as any model: what is exported is the merged weight, within half a step of it."""
    model, _ = load_model(llama())
    convert_to_resu(model, exclude="lm_head")
    masks = {}
    for name, layer in get_resu_modules(model).items():
        layer.prune_by_magnitude(0.5)
        masks[f"{name}.weight"] = layer.mask
        layer.enter_qresu_mode(bits=bits)
        layer.exit_qresu_mode(commit=commit)
    merged = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "merged")
    write_pack_quantized(tmp_path / "merged", tmp_path / "packed")
    raw = {name: Shards.open(tmp_path / "packed").read(name) for name in Shards.open(tmp_path / "packed").names}
    for name, mask in masks.items():
        weight, step = merged[name].double(), raw[name + "_scale"].double()
        codes = unpack_int4(raw[name + "_packed"], weight.shape[1]).double()
        assert ((codes * step - weight).abs() <= step / 2 * (1 + 1e-12)).all()
        assert (codes[weight == 0] == 0).all()
        assert commit or (codes[~mask.mask] == 0).all()


def test_memory_stays_that_of_a_weight(llama, tmp_path, monkeypatch):
    """One weight after the other is read, none twice."""
    source, read = llama(), []
    original = Stored.read
    monkeypatch.setattr(Stored, "read", lambda self, name: read.append(name) or original(self, name))
    write_pack_quantized(source, tmp_path / "packed")
    assert sorted(read) == sorted(Stored.open(source).names)
