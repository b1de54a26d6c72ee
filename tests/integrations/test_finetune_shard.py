"""Fine-tuning with the model divided over two processes (FSDP2): the result is that of one process."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import BertForMaskedLM, LlamaForCausalLM

from resu.core.mask_files import read_masks
from resu.core.shards import Shards
from resu.formats.validate import validate
from resu.integrations.finetune.launch import as_launched, own_sharding
from resu.integrations.finetune.loss import mean_loss
from resu.integrations.finetune.prepared import Prepared
from resu.integrations.finetune.run import finetune
from resu.integrations.finetune.sharding import find_blocks, shard
from tests.integrations.finetune_shard_settings import make_place, settings

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("shard"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    shards = Shards.open(folder)
    return {name: shards.read(name) for name in shards.names}


def started(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def compare(alone: Path, shared: Path) -> None:
    expected, found = weights(alone), weights(shared)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        # Its gradient is 0, for it moves all scores of a query alike: what Adam makes of the rounding is noise.
        if not name.endswith("key.bias"):
            torch.testing.assert_close(found[name], value, rtol=0, atol=2e-6)
    assert validate(shared)["ok"]
    masks = shared / "masks.safetensors"
    assert masks.is_file() == (alone / "masks.safetensors").is_file()
    if masks.is_file():
        assert read_masks(masks)[0] == read_masks(alone / "masks.safetensors")[0]
        for name, mask in read_masks(masks)[0].items():
            assert not found[name][~mask.mask].any()


@pytest.mark.slow
@pytest.mark.parametrize("names", ["full,masked,lora", "sparse-lora,resu,qresu,qresu-selective,rounded"])
def test_the_result_is_that_of_one_process(place: Path, tmp_path: Path, names: str) -> None:
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    started(*launch, "-m", "tests.integrations.finetune_shard_ranks", str(place), str(tmp_path), names)
    for name in names.split(","):
        alone = finetune(settings(place, name), tmp_path / f"{name}-alone")
        rounded = name == "rounded"  # moments, by blocks of each part
        if not rounded:
            compare(tmp_path / f"{name}-alone", tmp_path / name)
        whole, parts = weights(tmp_path / name), weights(tmp_path / f"{name}-parts")
        assert all(torch.equal(whole[key], parts[key]) for key in whole)  # resumed bit for bit
        held = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(2)]
        for one in held:
            assert one["here"] <= 0.53 * one["all"]
            assert one["moments"] == (1 if name == "lora" else 2) * one["here"]
            assert (one["whole"] > 0) == (name == "qresu-selective")
        assert sum(one["here"] for one in held) == held[0]["all"]
        assert held[0]["evaluation"] == held[1]["evaluation"]
        report = json.loads((tmp_path / name / "run.json").read_text())
        assert (report["trained"], report["sparsity"]) == (alone["trained"], alone["sparsity"])
        for when, found in alone["evaluation"].items():
            if when != "metric":
                assert report["evaluation"][when] == pytest.approx(found, rel=0.02 if rounded else 1e-5)
        smaller = name != "qresu-selective"
        assert (
            report["memory"]["kinds"]["optimizer"] < (0.56 if smaller else 1.0) * alone["memory"]["kinds"]["optimizer"]
        )


@pytest.mark.slow
def test_accelerate_launches_the_command_line(place: Path, tmp_path: Path) -> None:
    launch = ["accelerate.commands.launch", "--use_fsdp", "--fsdp_version=2", "--num_processes=2"]
    config = settings(place, "masked", shard=True)
    options = {
        "method": "masked", "sparsity": 0.5, "task": "classification", "steps": config.steps, "length": config.length,
        "clip": 0, "batch-size": 2, "learning-rate": 0.01, "schedule": "constant", "device": "cpu", "data": config.data,
        "validation": config.validation, "evaluate-steps": 2, "out": tmp_path / "out",
    }  # fmt: skip
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    started(*launch, "-m", "resu.cli.main", "finetune", str(config.source), "--update-in-backward", *given)
    finetune(settings(place, "masked"), tmp_path / "alone")
    compare(tmp_path / "alone", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["shard"] is True


def test_what_cannot_be_divided_is_refused(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="there is one: start several with torchrun"):
        finetune(settings(place, "masked", shard=True), tmp_path / "out")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="in-backward would use the gradient of each process alone"):
        finetune(settings(place, "masked"), tmp_path / "out")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="under FSDP1 is not supported"):
        finetune(settings(place, "masked"), tmp_path / "out")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert as_launched(settings(place, "masked")).shard
    with own_sharding():
        assert "ACCELERATE_USE_FSDP" not in os.environ
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="under DeepSpeed is not supported"):
        finetune(settings(place, "masked"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="Adafactor takes no parameters that lie in parts"):
        settings(place, "full", shard=True, optimizer="adafactor")
    mixed: Any = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16())])})
    with pytest.raises(ValueError, match="within Sequential parameters of bfloat16 and float32 train"):
        shard(Prepared(mixed, lambda: (mixed, {})), torch.device("cpu"))


def test_blocks_are_what_is_gathered_at_a_time(place: Path) -> None:
    llama: Any = LlamaForCausalLM.from_pretrained(place / "llama")
    assert find_blocks(llama) == list(llama.model.layers)
    bert: Any = BertForMaskedLM.from_pretrained(place / "bert")
    assert find_blocks(bert) == list(bert.bert.encoder.layer)
    model: Any = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.Sequential(nn.ModuleList([nn.Linear(3, 3)]))])
    model.empty = nn.ModuleList([nn.ReLU()])
    model.head = nn.Linear(3, 3)
    model.head.weight = model.layers[0].weight  # tied: gathered with the rest
    assert find_blocks(model) == [model.layers[1], model.layers[2]]
    twice: Any = nn.Module()
    twice.blocks = nn.ModuleList([nn.Linear(2, 2)])
    twice.again = twice.blocks[0]
    assert find_blocks(twice) == [twice.blocks[0]]


def test_the_loss_of_a_step_does_not_depend_on_its_parts() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5, 7, dtype=torch.float64), torch.randint(7, (6, 5))
    labels[torch.rand(6, 5) < 0.6] = -100
    logits.requires_grad_(True)
    count = (labels != -100).sum()
    expected = -sum(
        logits[i, j].detach().log_softmax(-1)[labels[i, j]] for i in range(6) for j in range(5) if labels[i, j] >= 0
    ) / int(count)
    whole = mean_loss(SimpleNamespace(logits=logits), labels)
    parts = sum(mean_loss(SimpleNamespace(logits=logits[i : i + 2]), labels[i : i + 2], count) for i in (0, 2, 4))
    assert isinstance(parts, torch.Tensor)
    assert math.isclose(whole.item(), float(expected), rel_tol=1e-6)
    assert math.isclose(parts.item(), float(expected), rel_tol=1e-6)
    gradients = [torch.autograd.grad(one, logits)[0] for one in (whole, parts)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


def test_passes_of_a_step_add_up_to_one(place: Path, tmp_path: Path) -> None:
    """Classification: transformers' own losses for it would make each pass count as a whole step."""
    finetune(settings(place, "sparse-lora"), tmp_path / "one")
    finetune(settings(place, "sparse-lora", batch_size=2, accumulate=2), tmp_path / "two")
    compare(tmp_path / "one", tmp_path / "two")
