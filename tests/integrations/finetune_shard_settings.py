"""Runs that are compared: divided over two processes, and in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from resu.integrations.finetune.config import FinetuneConfig
from tests.integrations.finetune_models import directory, labelled_file, text_file

RUNS: dict[str, dict[str, Any]] = {
    "full": {"kind": "llama", "accumulate": 2},
    "masked": {"kind": "bert", "evaluate_steps": 2, "in_backward": True, "clip": 0.0},
    "lora": {"kind": "llama", "gradient_checkpointing": True, "optimizer": "sgd"},
    "sparse-lora": {"kind": "bert"},
    "resu": {"kind": "llama", "commit": "sparse", "weight_decay": 0.1},
    "qresu": {"kind": "llama", "theta_init": "weight", "train_norms": True},
    "qresu-selective": {"kind": "bert"},
    "rounded": {"method": "qresu", "kind": "bert", "optimizer": "adamw8bit", "autocast": "bfloat16"},
}


def make_place(folder: Path) -> Path:
    """Models without dropout, whose sizes two does not divide, and texts."""
    directory(folder / "llama", "llama", tie_word_embeddings=True, intermediate_size=33)
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "intermediate_size": 33}
    directory(folder / "bert", "bert-body", **none)
    labelled_file(folder / "train.txt", 96)
    labelled_file(folder / "dev.txt", 21, seed=1)
    text_file(folder / "words.txt", 160)
    return folder


def settings(place: Path, name: str, **changes: Any) -> FinetuneConfig:
    """A run of :data:`RUNS`; ``shard=True`` with half the batch in each of two processes."""
    given: dict[str, Any] = {"method": name, "steps": 5, "length": 16, "rank": 2, "dropout": 0.0, "device": "cpu"}
    given |= {"learning_rate": 1e-2, "schedule": "constant", **RUNS[name]}
    kind = given.pop("kind")
    given |= {"source": place / kind, "batch_size": 2 if changes.get("shard") else 4}
    if kind == "bert":
        given |= {"task": "classification", "data": place / "train.txt", "validation": place / "dev.txt"}
    else:
        given["data"] = place / "words.txt"
    if given["method"] not in ("full", "lora"):
        given["sparsity"] = 0.5
    return FinetuneConfig(**{**given, **changes})
