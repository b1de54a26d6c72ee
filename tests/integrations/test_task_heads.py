"""A classifier is pruned and packed without its head, whichever way; by name it is taken."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from resu.core.mask_files import read_masks
from resu.formats.validate import validate
from resu.integrations.convert import convert
from resu.integrations.finetune.config import FinetuneConfig
from resu.integrations.finetune.run import finetune
from resu.integrations.hf_prune import prune_directory
from resu.integrations.quantize import write_pack_quantized
from resu.pruning.mask_generator import compute_masks_for_state_dict
from tests.integrations.finetune_models import labelled_file, text_file, tokenizer

HEAD = "classifier.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        id2label={0: "neg", 1: "pos"},
        label2id={"neg": 0, "pos": 1},
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(folder / "model")
    tokenizer(encoder=True).save_pretrained(folder / "model")
    text_file(folder / "words.txt", 40)
    labelled_file(folder / "train.txt", 48)
    labelled_file(folder / "dev.txt", 12, seed=1)
    prune_directory(folder / "model", folder / "all", 0.5, include=["*.dense", "classifier"])
    return folder


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_pruning_leaves_the_head_and_says_so(place: Path, tmp_path: Path, method: str) -> None:
    data: dict[str, Any] = {"calibration": place / "words.txt", "samples": 4} if method == "wanda" else {}
    report = prune_directory(place / "model", tmp_path / "out", 0.5, method, **data)
    assert report["skipped"][HEAD] == "head of the task"
    masks = read_masks(tmp_path / "out" / "masks.safetensors")[0]
    assert masks
    assert HEAD not in masks
    before, after = (AutoModelForSequenceClassification.from_pretrained(f) for f in (place / "model", tmp_path / "out"))
    assert torch.equal(before.get_parameter(HEAD), after.get_parameter(HEAD))
    asked = prune_directory(place / "model", tmp_path / "head", 0.5, method, include=HEAD, **data)
    assert [row["name"] for row in asked["layers"]] == [HEAD]


def test_masks_of_a_folder_are_those_of_pruning_it(place: Path, tmp_path: Path) -> None:
    prune_directory(place / "model", tmp_path / "out", 0.5)
    written = read_masks(tmp_path / "out" / "masks.safetensors")[0]
    found = compute_masks_for_state_dict(place / "model", 0.5)
    assert found.keys() == written.keys()


def test_four_bits_leave_the_head_dense(place: Path, tmp_path: Path) -> None:
    report = write_pack_quantized(place / "model", tmp_path / "out")
    assert report["ignored"] == ["classifier"]


def tuned(place: Path, out: Path, method: str, **changes: Any) -> dict[str, Any]:
    pytest.importorskip("accelerate")
    given: dict[str, Any] = {"source": place / "all", "data": place / "train.txt", "validation": place / "dev.txt"}
    given |= {
        "method": method,
        "task": "classification",
        "steps": 3,
        "batch_size": 4,
        "length": 16,
        "rank": 2,
        "learning_rate": 1e-2,
    }
    return finetune(FinetuneConfig(**{**given, "device": "cpu", **changes}), out)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("masked", {}),
        ("sparse-lora", {}),
        ("sparse-lora", {"bits": 4}),
        ("resu", {}),
        ("qresu", {"commit": "sparse"}),
        ("qresu-selective", {}),
    ],
)
def test_a_sparse_head_trains_and_keeps_its_zeros(
    place: Path, tmp_path: Path, method: str, changes: dict[str, Any]
) -> None:
    report = tuned(place, tmp_path / "out", method, **changes)
    before, after = (read_masks(folder / "masks.safetensors")[0] for folder in (place / "all", tmp_path / "out"))
    assert after[HEAD] == before[HEAD]
    was, now = (
        AutoModelForSequenceClassification.from_pretrained(folder).get_parameter(HEAD)
        for folder in (place / "all", tmp_path / "out")
    )
    assert not after[HEAD].get_pruned(now.detach()).any()
    assert (after[HEAD].get_active(now.detach()) != after[HEAD].get_active(was.detach())).all()
    assert report["sparsity"] == 0.5
    assert (len(after) == 1) == (method in ("resu", "qresu-selective"))  # θ made the others dense
    assert validate(tmp_path / "out")["ok"]


def test_a_new_head_for_other_classes_has_no_mask(place: Path, tmp_path: Path) -> None:
    lines = (place / "train.txt").read_text().splitlines()
    text = "".join(f"{('neg', 'pos', 'odd')[i % 3]} {line.split(' ', 1)[1]}\n" for i, line in enumerate(lines))
    (tmp_path / "three.txt").write_text(text)
    tuned(place, tmp_path / "out", "masked", data=tmp_path / "three.txt", validation=tmp_path / "three.txt")
    masks = read_masks(tmp_path / "out" / "masks.safetensors")[0]
    assert HEAD not in masks
    assert masks.keys() == read_masks(place / "all" / "masks.safetensors")[0].keys() - {HEAD}


def test_a_head_alone_is_for_masked_training(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"only classifier\.weight is to be pruned, which trains whole"):
        tuned(place, tmp_path / "out", "qresu", include=("classifier",))
    assert tuned(place, tmp_path / "out", "masked", include=("classifier",))["sparsity"] == 0.5


def test_a_classifier_is_not_taken_for_a_language_model(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="BertForSequenceClassification, and the text has no labels"):
        tuned(place, tmp_path / "out", "masked", task="auto")


@pytest.mark.parametrize("layout", ["bitmask", "pack-quantized"])
def test_a_layout_of_our_own_is_refused_with_the_way_back(place: Path, tmp_path: Path, layout: str) -> None:
    source = tmp_path / layout
    if layout == "bitmask":
        prune_directory(place / "model", source, 0.5, layout="bitmask")
    else:
        write_pack_quantized(place / "model", source)
    advice = f"resu export {source} --to dense --out DIR"
    with pytest.raises(ValueError, match=re.escape(advice)):
        tuned(place, tmp_path / "out", "masked", source=source)
    with pytest.raises(ValueError, match=r"resu export .*--to dense"):
        prune_directory(source, tmp_path / "out", 0.75)
    convert(source, tmp_path / "back", "dense")
    assert prune_directory(tmp_path / "back", tmp_path / "out", 0.75)["actual"] == 0.75
