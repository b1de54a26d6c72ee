"""Directories pruned by one call: what is refused before a model is loaded, and what is left as it was."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
import transformers

from resu.core.pattern import NM
from resu.core.shards import Shards
from resu.formats.validate import validate
from resu.integrations.hf import load_model
from resu.integrations.hf_prune import causal_loss, prune_directory, settle_sparsity
from resu.integrations.hf_save import save_pruned


@pytest.mark.parametrize(
    ("sparsity", "pattern", "meant"),
    [(0.3, None, 0.3), (None, "2:4", 0.5), (0.75, NM(1, 4), 0.75), ({"*": 0.5}, "2:4", {"*": 0.5}), (0.0, "row", 0.0)],
)
def test_the_sparsity_that_is_meant(sparsity, pattern, meant):
    assert settle_sparsity(sparsity, pattern) == meant


@pytest.mark.parametrize(("sparsity", "pattern"), [(None, None), (None, "row"), (0.6, "2:4"), ({"*": 0.6}, "2:4")])
def test_a_sparsity_that_cannot_be_meant(sparsity, pattern):
    with pytest.raises(ValueError, match="sparsity"):
        settle_sparsity(sparsity, pattern)


def test_trap_30_padding_does_not_count_in_the_loss(stories):
    model, _ = load_model(stories)
    ids = torch.tensor([[1, 403, 407, 261]])
    padded = {
        "input_ids": torch.tensor([[1, 403, 407, 261, 9, 9]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
    }
    plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        assert float(causal_loss(model, padded)) == pytest.approx(float(causal_loss(model, plain)), rel=1e-5)


def test_every_method_with_data_gives_its_exact_count(stories, texts, tmp_path):
    for method in ("wanda", "ria", "sparsegpt", "gradient", "taylor", "fisher", "snip"):
        report = prune_directory(
            stories, tmp_path / method, 0.4, method, calibration=texts[0], samples=4, length=32, include="*.1.mlp.*"
        )
        assert report["source"] == str(stories)
        kept = [layer["kept"] for layer in report["layers"]]
        if method == "wanda":  # the floor is taken in each row
            assert kept == [172 * (64 - 25), 172 * (64 - 25), 64 * (172 - 68)]
        else:
            assert kept == [11_008 - 4403] * 3


def test_the_configuration_is_not_touched_by_calibration(stories, texts, tmp_path):
    options = {"calibration": texts[0], "samples": 4, "length": 32, "dtype": torch.bfloat16}
    prune_directory(stories, tmp_path / "out", 0.5, "wanda", **options)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["use_cache"] is True


def bert(folder):
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "lily", "went", "home", "to", "play", "."]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_encoders_are_calibrated_on_lines_and_judged_by_their_embeddings(tmp_path):
    folder = bert(tmp_path / "bert")
    (tmp_path / "lines.txt").write_text("Lily went home.\nTo play\nLily\n")
    options = {"calibration": tmp_path / "lines.txt", "samples": 3, "evaluate": tmp_path / "lines.txt"}
    report = prune_directory(folder, tmp_path / "out", 0.5, "wanda", **options)
    assert report["evaluation"]["metric"] == "cosine"
    assert report["evaluation"]["sentences"] == 3
    assert 0 < report["evaluation"]["after"] < 1
    same = prune_directory(folder, tmp_path / "same", 0.0, "wanda", **options)
    assert same["evaluation"]["after"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="need a loss"):
        prune_directory(folder, tmp_path / "third", 0.5, "taylor", **options)


def test_encoder_decoders_are_pruned_without_data_and_refused_with_it(texts, tmp_path):
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    assert prune_directory(tmp_path / "t5", tmp_path / "out", 0.5)["actual"] == 0.5
    assert type(load_model(tmp_path / "out")[0]).__name__ == "T5ForConditionalGeneration"
    bert(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "t5" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    with pytest.raises(ValueError, match="encoder-decoder"):
        prune_directory(tmp_path / "t5", tmp_path / "second", 0.5, "wanda", calibration=texts[0])
    with pytest.raises(ValueError, match="encoder-decoder"):
        prune_directory(tmp_path / "t5", tmp_path / "second", 0.5, evaluate=texts[1])


def test_a_directory_without_a_tokenizer_says_so(stories, texts, tmp_path):
    model, _ = load_model(stories)
    model.save_pretrained(tmp_path / "bare")
    assert prune_directory(tmp_path / "bare", tmp_path / "out", 0.5)["actual"] == 0.5
    with pytest.raises(ValueError, match="no tokenizer"):
        prune_directory(tmp_path / "bare", tmp_path / "second", 0.5, "wanda", calibration=texts[0])
    with pytest.raises(ValueError, match="no tokenizer"):
        prune_directory(tmp_path / "bare", tmp_path / "second", 0.5, evaluate=texts[1])


def test_what_is_impossible_is_known_before_the_model_is_loaded(tmp_path, texts, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr("resu.integrations.hf_prune.load_model", loaded)
    for options in (
        {"method": "wanda"},
        {"method": "wand"},
        {"method": "wanda", "calibration": tmp_path / "absent"},
        {"method": "wanda", "calibration": texts[0], "refine": "x"},
        {"method": "wanda", "calibration": texts[0], "pattern": "block:2x2", "refine": "dsnot"},
        {"method": "wanda", "calibration": texts[0], "distribution": "x"},
        {"method": "wanda", "calibration": texts[0], "evaluate": tmp_path / "absent"},
        {"method": "wanda", "calibration": texts[0], "layout": "x"},
    ):
        with pytest.raises((ValueError, FileNotFoundError)):
            prune_directory(tmp_path, tmp_path / "out", 0.5, **options)


def test_input_a_source_inside_the_result_that_is_replaced_stays(stories, texts, tmp_path):
    source = tmp_path / "result" / "model"
    shutil.copytree(stories, source)
    (tmp_path / "result" / "pruning.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    for method, calibration in (("wanda", texts[0]), ("magnitude", None)):
        with pytest.raises(ValueError, match="inside or above"):
            prune_directory(
                source,
                tmp_path / "result",
                0.5,
                method=method,
                calibration=calibration,
                samples=2,
                length=16,
                overwrite=True,
            )
        assert sorted(tmp_path.rglob("*")) == before


def test_one_flipped_bit_in_a_kept_weight_is_found(stories, texts, tmp_path):
    from resu.core.mask_files import read_masks

    name = "model.layers.1.mlp.up_proj.weight"
    data = {"calibration": texts[0], "samples": 4, "length": 32}
    prune_directory(stories, tmp_path / "out", 0.5, "wanda", **data)
    prune_directory(stories, tmp_path / "plain", 0.5)
    found = validate(tmp_path / "out")
    assert found["ok"], found["violations"]
    assert found["total"]["checksums"] == validate(tmp_path / "plain")["total"]["checksums"] == len(found["tensors"])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "plain").iterdir()}
    file = tmp_path / "out" / "model.safetensors"
    assert file.stat().st_mode == (tmp_path / "out" / "config.json").stat().st_mode
    entry = Shards.open(tmp_path / "out").entries[name]
    kept = int(read_masks(tmp_path / "out" / "masks.safetensors")[0][name].mask.flatten().int().argmax())
    damaged = bytearray(file.read_bytes())
    damaged[entry.start + 4 * kept] ^= 1  # the last bit of the mantissa
    file.write_bytes(damaged)
    violations = validate(tmp_path / "out")["violations"]
    assert [v["name"] for v in violations] == [name]
    assert "does not match its checksum" in violations[0]["problem"]


def test_shards_with_checksums_load_as_they_were(stories, texts, tmp_path):
    model, tokenizer = load_model(stories)
    model.save_pretrained(tmp_path / "shards", max_shard_size="400KB")
    tokenizer.save_pretrained(tmp_path / "shards")
    model, tokenizer = load_model(tmp_path / "shards")
    result = SimpleNamespace(masks={}, report={"warnings": [], "layers": []})
    save_pruned(model, tokenizer, result, tmp_path / "shards", tmp_path / "out", max_shard_size="400KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    found = validate(tmp_path / "out")
    assert found["ok"]
    assert found["total"]["checksums"] == len(found["tensors"]) > 0
    again, _ = load_model(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_what_is_left_out_is_said_alike_with_and_without_data(stories, texts, tmp_path):
    with_data = prune_directory(stories, tmp_path / "a", 0.5, "wanda", calibration=texts[0], samples=4, length=32)
    without = prune_directory(stories, tmp_path / "b", 0.5)
    assert with_data["skipped"] == without["skipped"]
    assert with_data["skipped"]["model.embed_tokens.weight"] == "embedding"
    assert with_data["skipped"]["lm_head.weight"] == "output head tied to model.embed_tokens.weight"
