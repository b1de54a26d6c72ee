"""A pruned directory repaired from disk: the bits of a repair in memory, little memory, resumed, refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")
from resu.core.shards import Shards
from resu.formats.validate import validate
from resu.integrations.hf import load_model
from resu.integrations.hf_empty import empty_model
from resu.integrations.hf_prune import model_batches, prune_directory
from resu.integrations.reconstruct import reconstruct_directory
from resu.pruning.mask_ops import load_mask
from resu.pruning.reconstruction import reconstruct
from tests.integrations.test_hf_prune import bert
from tests.pruning import hf_models

TEXT = {"samples": 6, "length": 32, "batch_size": 2}
PLAN = {"epochs": 1}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text of the kind the model is for."""
    animals, deeds = ("dog", "cat", "bird", "bear", "frog"), ("play", "run", "sing", "eat a cake", "go to the park")
    lines = [f"Once there was a little {a} named Lily. She liked to {d} with her mom." for a in animals for d in deeds]
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="module")
def half(stories, tmp_path_factory):
    """stories260K with half of its weights."""
    folder = tmp_path_factory.mktemp("half") / "pruned"
    prune_directory(stories, folder, 0.5)
    return folder


def in_memory(pruned, dense, text, plan):
    model, tokenizer = load_model(pruned)
    batches = model_batches(model, tokenizer, text, TEXT["samples"], TEXT["length"], 0, most=TEXT["batch_size"])
    masks, _ = load_mask(pruned / "masks.safetensors")
    return model, reconstruct(model, masks, dense=load_model(dense)[0], calibration=batches, **plan)


def test_repaired_from_disk_is_repaired_in_memory_bit_for_bit(stories, half, text, tmp_path):
    told = []
    report = reconstruct_directory(
        half,
        tmp_path / "out",
        dense=stories,
        calibration=text,
        progress=lambda *a: told.append(a),
        **TEXT,
        **PLAN,
    )
    model, expected = in_memory(half, stories, text, PLAN)
    repaired, _ = load_model(tmp_path / "out")
    for (name, a), b in zip(model.named_parameters(), repaired.parameters(), strict=True):
        assert torch.equal(a, b), name
    blocks = report["reconstruction"]["blocks"]
    assert [{**b, "seconds": 0} for b in blocks] == [{**b, "seconds": 0} for b in expected.report["blocks"]]
    assert len(blocks) == 5
    assert all(block["after"] < block["before"] for block in blocks)
    assert [done for done, _, _ in told] == [1, 2, 3, 4, 5]
    assert told[0][1:] == (5, f"model.layers.0: error {blocks[0]['after']:.3g}")
    assert json.loads((tmp_path / "out" / "pruning.json").read_text()) == report
    assert report["actual"] == 0.5
    assert report["method"] == "magnitude"
    assert (tmp_path / "out" / "masks.safetensors").read_bytes() == (half / "masks.safetensors").read_bytes()
    assert validate(tmp_path / "out")["ok"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # nothing is left beside it


def test_theta_leaves_a_dense_model_and_active_weights_as_they_were(stories, half, text, tmp_path):
    report = reconstruct_directory(
        half, tmp_path / "out", dense=stories, calibration=text, train="theta", **TEXT, **PLAN
    )
    assert report["actual"] == 0
    assert not (tmp_path / "out" / "masks.safetensors").exists()
    assert report["layers"] == []
    assert validate(tmp_path / "out")["ok"]
    before, after = Shards.open(half), Shards.open(tmp_path / "out")
    for name, mask in load_mask(half / "masks.safetensors")[0].items():
        assert torch.equal(before.read(name)[mask], after.read(name)[mask])
        assert after.read(name)[~mask].count_nonzero() > 0


def test_an_interrupted_run_goes_on_to_the_same_bytes(stories, half, text, tmp_path):
    class Interrupted(Exception):
        pass

    def stop(done, total, what):
        if done == 3:
            raise Interrupted

    options = {"dense": stories, "calibration": text, **TEXT, **PLAN}
    reconstruct_directory(half, tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        reconstruct_directory(half, tmp_path / "out", progress=stop, **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileExistsError, match="resume=True"):
        reconstruct_directory(half, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="other settings"):
        reconstruct_directory(half, tmp_path / "out", resume=True, **options | {"epochs": 2})
    told = []
    reconstruct_directory(half, tmp_path / "out", resume=True, progress=lambda *a: told.append(a[0]), **options)
    assert told == [3, 4, 5]
    a, b = tmp_path / "whole" / "model.safetensors", tmp_path / "out" / "model.safetensors"
    assert a.read_bytes() == b.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"whole", "out"}


@pytest.mark.parametrize("kind", ["gpt2 in shards", "bert"])
def test_other_architectures(kind, text, tmp_path, stories):
    if kind == "bert":
        dense = tmp_path / "dense"
        bert(dense)
        text = tmp_path / "lines.txt"
        text.write_text("lily went home\nlily went to play .\n" * 8)
    else:
        model = hf_models.gpt2()
        model.resize_token_embeddings(512, mean_resizing=False)
        dense = tmp_path / "dense"
        model.save_pretrained(dense, max_shard_size="20KB")
        for file in stories.glob("tokenizer*"):
            shutil.copy(file, dense)
    prune_directory(dense, tmp_path / "pruned", 0.5)
    options = {"samples": 6, "length": 16, "batch_size": 2, "epochs": 2}
    report = reconstruct_directory(tmp_path / "pruned", tmp_path / "out", dense=dense, calibration=text, **options)
    assert len(report["reconstruction"]["blocks"]) == 2
    outside = {"pooler.dense.weight": "outside of blocks"} if kind == "bert" else {}
    assert report["reconstruction"]["skipped"] == outside
    assert validate(tmp_path / "out")["ok"]
    repaired, _ = load_model(tmp_path / "out")
    before, after = Shards.open(tmp_path / "pruned"), Shards.open(tmp_path / "out")
    assert before.files == after.files
    masks, _ = load_mask(tmp_path / "out" / "masks.safetensors")
    for name in before.names:
        same = torch.equal(before.read(name), after.read(name))
        assert same == (name not in masks or name in outside), name
    assert sum(int((p == 0).sum()) for p in repaired.parameters()) > 0


def test_an_empty_model_takes_no_memory_and_knows_its_buffers(stories):
    model, whole = empty_model(stories), load_model(stories)[0]
    assert sum(p.untyped_storage().nbytes() for p in model.parameters()) < 1000
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in whole.named_parameters()]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for (name, a), (_, b) in zip(model.named_buffers(), whole.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    assert not model.training


def test_weights_that_cannot_be_read_one_by_one(tmp_path):
    model = hf_models.mixtral()  # saved expert by expert, fused when it is loaded
    model.save_pretrained(tmp_path / "mixtral")
    names = load_file(tmp_path / "mixtral" / "model.safetensors")
    if any("gate_up_proj" in name for name in names):
        pytest.skip("this release of transformers stores experts as the model has them")
    with pytest.raises(ValueError, match=r"load it and call resu\.reconstruct"):
        empty_model(tmp_path / "mixtral")


def test_what_is_refused(stories, half, text, tmp_path):
    def refused(kind, match, pruned=half, out=tmp_path / "out", **change):
        options = {"dense": stories, "calibration": text, **TEXT, **PLAN} | change
        with pytest.raises(kind, match=match):
            reconstruct_directory(pruned, out, **options)
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out.*"))

    refused(FileNotFoundError, "no file or folder", pruned=tmp_path / "absent")
    refused(FileNotFoundError, "no mask file", pruned=stories)
    refused(FileNotFoundError, "there is no file", calibration=tmp_path / "absent.txt")
    refused(FileNotFoundError, "absent", dense=tmp_path / "absent")
    refused(ValueError, "'kept', 'theta', 'lora'", train="all")
    refused(ValueError, "too short", samples=100_000)
    refused(ValueError, "two calibration batches", samples=2)
    refused(ValueError, "must not be the source", out=half / "out")
    bert(tmp_path / "bert")
    refused(ValueError, "dense model has no", dense=tmp_path / "bert")
    packed = tmp_path / "packed"
    prune_directory(stories, packed, 0.5, layout="bitmask")
    refused(ValueError, "bitmask layout", pruned=packed)
