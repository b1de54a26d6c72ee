"""Experts that are stored one by one and fused in the model: their masks go both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import MixtralConfig, MixtralForCausalLM

from resu.core.mask_files import read_masks
from resu.core.shards import Shards
from resu.formats.validate import validate
from resu.integrations.convert import convert
from resu.integrations.finetune.config import FinetuneConfig
from resu.integrations.finetune.run import finetune
from resu.integrations.hf import load_model
from resu.integrations.hf_names import masks_as_loaded, parts_in_file
from resu.integrations.hf_prune import prune_directory
from tests.integrations.finetune_models import text_file, tokenizer

EXPERT = "model.layers.0.block_sparse_moe.experts.1.w3.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2))
    model.save_pretrained(folder / "model")
    tokenizer(encoder=False).save_pretrained(folder / "model")
    text_file(folder / "words.txt", 120)
    if EXPERT not in Shards.open(folder / "model").entries:
        pytest.skip("this transformers stores experts as it fuses them")
    prune_directory(folder / "model", folder / "magnitude", 0.5)
    data: dict[str, Any] = {"calibration": folder / "words.txt", "samples": 8, "length": 16}
    prune_directory(folder / "model", folder / "wanda", 0.5, "wanda", **data)
    return folder


def zeros_are_where_masks_say(folder: Path) -> dict[str, torch.Tensor]:
    shards, masks = Shards.open(folder), read_masks(folder / "masks.safetensors")[0]
    for name, mask in masks.items():
        weight = shards.read(name)
        assert torch.equal(weight != 0, mask.mask), name
    return {name: mask.mask for name, mask in masks.items()}


def test_masks_of_a_method_with_data_have_the_names_of_the_file(place: Path, tmp_path: Path) -> None:
    masks = zeros_are_where_masks_say(place / "wanda")
    assert sum("experts" in name for name in masks) == 12
    assert masks[EXPERT].shape == (32, 16)
    found = validate(place / "wanda")
    assert found["ok"], found["violations"]
    convert(place / "wanda", tmp_path / "packed", "bitmask")
    convert(tmp_path / "packed", tmp_path / "back", "dense")
    a, b = Shards.open(place / "wanda"), Shards.open(tmp_path / "back")
    assert all(torch.equal(a.read(name), b.read(name)) for name in a.names)


@pytest.mark.parametrize("source", ["magnitude", "wanda"])
def test_masked_training_keeps_the_zeros_of_experts(place: Path, tmp_path: Path, source: str) -> None:
    settings: dict[str, Any] = {"data": place / "words.txt", "steps": 3, "batch_size": 4, "length": 16}
    settings |= {"source": place / source, "method": "masked", "learning_rate": 1e-2, "device": "cpu"}
    report = finetune(FinetuneConfig(**settings), tmp_path / "out")
    before, after = zeros_are_where_masks_say(place / source), zeros_are_where_masks_say(tmp_path / "out")
    router = {name for name in before if name.endswith("block_sparse_moe.gate.weight")}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(router) == (source == "magnitude")  # renamed, not divided
    assert report["sparsity"] == 0.5
    assert validate(tmp_path / "out")["ok"]


@pytest.mark.parametrize("method", ["sparse-lora", "resu"])
def test_what_cannot_train_experts_names_what_can(place: Path, tmp_path: Path, method: str) -> None:
    settings: dict[str, Any] = {"data": place / "words.txt", "steps": 1, "batch_size": 4, "length": 16, "rank": 2}
    settings |= {"source": place / "magnitude", "method": method, "device": "cpu"}
    with pytest.raises(ValueError, match=r"experts.*masked"):
        finetune(FinetuneConfig(**settings), tmp_path / "out")
    finetune(FinetuneConfig(**settings, exclude=("*.mlp.*",)), tmp_path / "out")
    masks = read_masks(tmp_path / "out" / "masks.safetensors")[0]
    assert EXPERT in masks  # left as they were, and said to be sparse


def test_positions_go_there_and_back(place: Path) -> None:
    model: Any = load_model(place / "magnitude")[0]
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    masks = read_masks(place / "magnitude" / "masks.safetensors")[0]
    found = masks_as_loaded(model, masks, [fused, "model.layers.0.self_attn.q_proj.weight"])
    assert list(found) == [fused]
    assert torch.equal(found[fused].mask, model.get_parameter(fused) != 0)
    parts = parts_in_file(model, {fused: found[fused].mask.to(torch.uint8)})
    assert torch.equal(parts[EXPERT].bool(), masks[EXPERT].mask)
    some = masks_as_loaded(model, {EXPERT: masks[EXPERT]}, [fused])  # the other experts stay whole
    assert some[fused].n_pruned == masks[EXPERT].n_pruned
    with pytest.raises(ValueError, match="masks are of another model"):
        masks_as_loaded(model, {EXPERT: masks["model.layers.0.self_attn.q_proj.weight"]}, [fused])
