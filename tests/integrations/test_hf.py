"""Hugging Face directories: what is loaded is what is stored, and what is written loads with from_pretrained."""

import contextlib
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
import transformers

from resu.core.io import FileFormatError
from resu.core.mask_files import read_masks
from resu.formats.validate import validate
from resu.integrations.hf import load_model, load_tokenizer
from resu.integrations.hf_save import save_pruned
from resu.pruning.mask_ops import load_mask
from resu.pruning.one_shot import prune_model


@pytest.fixture
def copy(stories, tmp_path):
    return shutil.copytree(stories, tmp_path / "model")


def halves(model, *names):
    """Prunes the first half of the columns of the named weights; what prune_model would return."""
    masks = {}
    for name in names:
        weight = model.get_parameter(name)
        mask = torch.ones_like(weight, dtype=torch.bool)
        mask[:, : weight.shape[1] // 2] = False
        with torch.no_grad():
            weight.copy_(weight.where(mask, 0))
        masks[name] = mask
    return SimpleNamespace(masks=masks, report={"method": "halves", "sparsity": 0.5, "layers": [], "warnings": []})


QUERY = "model.layers.0.self_attn.q_proj.weight"


def test_what_is_loaded_is_what_is_stored(stories):
    model, tokenizer = load_model(stories)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer("Lily")["input_ids"][0] == 1
    half, _ = load_model(stories, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_a_pruned_model_loads_with_its_zeros_and_ties_and_nothing_else_changed(stories, tmp_path):
    model, tokenizer = load_model(stories)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = halves(model, QUERY)
    report = save_pruned(model, tokenizer, result, stories, tmp_path / "out")
    again, _ = load_model(tmp_path / "out")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    for name, value in again.state_dict().items():
        wanted = before[name].where(result.masks[name], 0) if name == QUERY else before[name]
        assert torch.equal(value, wanted), name
    masks, header = read_masks(tmp_path / "out" / "masks.safetensors")
    assert torch.equal(masks[QUERY].mask, result.masks[QUERY])
    assert header["metadata"]["method"] == "halves"
    assert json.loads((tmp_path / "out" / "pruning.json").read_text()) == report
    assert report["warnings"] == []
    assert report["bytes"] == 4 * 260_032
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (stories / name).read_bytes()


@pytest.mark.parametrize("layout", ["dense", "bitmask"])
def test_trap_10_a_tied_weight_has_one_mask_under_the_name_that_is_stored(stories, tmp_path, layout):
    model, tokenizer = load_model(stories)
    result = prune_model(model, 0.5, include=["lm_head", "*.q_proj"])
    report = save_pruned(model, tokenizer, result, stories, tmp_path / "out", layout=layout)
    masks, _ = load_mask(tmp_path / "out" / "masks.safetensors")
    assert "model.embed_tokens.weight" in masks
    assert "lm_head.weight" not in masks
    assert torch.equal(masks["model.embed_tokens.weight"], result.masks["lm_head.weight"])
    assert sorted(row["name"] for row in report["layers"]) == sorted(masks)
    assert validate(tmp_path / "out")["violations"] == []


def test_shards_and_half_precision_are_kept(stories, tmp_path):
    model, tokenizer = load_model(stories, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half", max_shard_size="200KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(stories / name, tmp_path / "half")
    assert len(list((tmp_path / "half").glob("model-*.safetensors"))) > 1
    model, tokenizer = load_model(tmp_path / "half")
    assert model.dtype == torch.bfloat16
    save_pruned(model, tokenizer, halves(model, QUERY), tmp_path / "half", tmp_path / "out", max_shard_size="200KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    again, _ = load_model(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_a_checkpoint_of_mixed_dtypes_stays_mixed_to_the_bit(copy, tmp_path):
    from safetensors.torch import load_file, save_file

    stored = load_file(copy / "model.safetensors")
    mixed = {name: value if "norm" in name else value.bfloat16() for name, value in stored.items()}
    save_file(mixed, copy / "model.safetensors", metadata={"format": "pt"})
    model, tokenizer = load_model(copy)
    assert model.dtype == torch.float32
    save_pruned(model, tokenizer, halves(model, QUERY), copy, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == mixed.keys()
    for name, value in after.items():
        assert value.dtype == mixed[name].dtype, name
        assert name == QUERY or torch.equal(value, mixed[name]), name


def test_another_dtype_is_written_into_the_configuration(stories, tmp_path):
    model, tokenizer = load_model(stories, dtype=torch.bfloat16)
    save_pruned(model, tokenizer, halves(model, QUERY), stories, tmp_path / "out", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_model(tmp_path / "out")[0].dtype == torch.bfloat16


def test_generation_settings_that_transformers_would_not_write_survive(copy, tmp_path):
    settings = {"bos_token_id": 1, "eos_token_id": 2, "do_sample": False, "temperature": 0.6}
    (copy / "generation_config.json").write_text(json.dumps(settings))
    model, tokenizer = load_model(copy)
    save_pruned(model, tokenizer, halves(model, QUERY), copy, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == settings


def test_what_lies_beside_comes_along_and_what_is_lost_is_named(copy, tmp_path):
    from safetensors.torch import load_file, save_file

    stored = load_file(copy / "model.safetensors")
    save_file(stored | {"extra.weight": torch.ones(2)}, copy / "model.safetensors", metadata={"format": "pt"})
    (copy / "1_Pooling").mkdir()
    (copy / "1_Pooling" / "config.json").write_text("{}")
    (copy / "model.onnx").write_bytes(b"dense")
    model, tokenizer = load_model(copy)
    report = save_pruned(model, tokenizer, halves(model, QUERY), copy, tmp_path / "out")
    assert [text.split()[:2] for text in report["warnings"]] == [["tensor", "extra.weight"], ["model.onnx", "was"]]
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
    assert not (tmp_path / "out" / "model.onnx").exists()


def test_nothing_is_overwritten_unasked_and_nothing_is_left_half_written(stories, tmp_path):
    model, tokenizer = load_model(stories)
    result = halves(model, QUERY)
    save_pruned(model, tokenizer, result, stories, tmp_path / "out")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_pruned(model, tokenizer, result, stories, tmp_path / "out")
    save_pruned(model, tokenizer, result, stories, tmp_path / "out", overwrite=True)
    broken = SimpleNamespace(masks=result.masks, report={"seconds": math.nan, "layers": [], "warnings": []})
    with pytest.raises(ValueError, match="JSON"):
        save_pruned(model, tokenizer, broken, stories, tmp_path / "second")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    with pytest.raises(FileExistsError, match="no earlier result"):
        save_pruned(model, tokenizer, result, stories, stories, overwrite=True)


def test_encoders_load_as_what_they_are(tmp_path):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertModel(config)
    model.save_pretrained(tmp_path / "bert")
    again, tokenizer = load_model(tmp_path / "bert")
    assert type(again) is transformers.BertModel
    assert tokenizer is None
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    name = "encoder.layer.1.output.dense.weight"
    save_pruned(again, None, halves(again, name), tmp_path / "bert", tmp_path / "out")
    third, _ = load_model(tmp_path / "out")
    assert int((third.get_parameter(name) == 0).sum()) == 16 * 16


def test_code_of_a_tokenizer_is_not_run(copy):
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Custom", "auto_map": {"AutoTokenizer": ["tokenization_custom.Custom", None]}}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    (copy / "tokenization_custom.py").write_text("raise SystemExit('ran')\nclass Custom: pass\n")
    with contextlib.suppress(ValueError):  # refused, or read without that code; SystemExit would come through
        assert type(load_tokenizer(copy)).__name__ != "Custom"


def test_gpt2_and_its_transposed_weights_survive(tmp_path):
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    model, _ = load_model(tmp_path / "gpt2")
    name = "transformer.h.0.mlp.c_fc.weight"
    save_pruned(model, None, halves(model, name), tmp_path / "gpt2", tmp_path / "out")
    again, _ = load_model(tmp_path / "out")
    assert again.lm_head.weight is again.transformer.wte.weight
    assert torch.equal(again.get_parameter(name), model.get_parameter(name))


def rewrite(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_wrong_directories_are_refused_with_the_reason(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="no directory"):
        load_model(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_model(tmp_path / "empty")
    rewrite(copy, architectures=["CustomForCausalLM"])
    with pytest.raises(ValueError, match=r"CustomForCausalLM.*transformers"):
        load_model(copy)
    rewrite(copy, architectures=None, auto_map={"AutoModel": "modeling_custom.Custom"})
    with pytest.raises(ValueError, match=r"modeling_custom\.Custom.*is not run"):
        load_model(copy)
    rewrite(copy, architectures=["LlamaForCausalLM"], auto_map=None, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ValueError, match=r"quantized \(gptq\)"):
        load_model(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(FileFormatError, match="no JSON"):
        load_model(copy)
    (copy / "config.json").write_text("[]")
    with pytest.raises(FileFormatError, match="holds a list"):
        load_model(copy)


def test_trap_39_weights_that_are_missing_are_never_random(copy):
    rewrite(copy, num_hidden_layers=6)
    with pytest.raises(FileFormatError, match=r"lacks weights.*model\.layers\.5"):
        load_model(copy)
    rewrite(copy, num_hidden_layers=5, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(FileFormatError, match=r"lacks weights.*score"):
        load_model(copy)


def test_a_shape_that_does_not_fit_is_refused(copy):
    rewrite(copy, intermediate_size=100)
    with pytest.raises(FileFormatError, match=r"down_proj\.weight \(\(64, 172\), needed \(64, 100\)\)"):
        load_model(copy)


def test_pickles_and_damaged_weights_are_refused(copy):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(FileFormatError, match="truncated"):
        load_model(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no safetensors"):
        load_model(copy)
    torch.save({"x": torch.ones(1)}, copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickle"):
        load_model(copy)


def test_a_damaged_tokenizer_is_named(copy):
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read the tokenizer"):
        load_tokenizer(copy)


def test_transformers_says_what_it_said_before(stories, capfd):
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(stories)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bars)
    assert capfd.readouterr().err == ""
