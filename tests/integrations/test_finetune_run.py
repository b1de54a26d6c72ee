"""Whole runs: what is written loads, resumes bit for bit, and replaces nothing unasked."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from resu.core.io import FileFormatError
from resu.core.mask_files import read_masks
from resu.core.shards import Shards
from resu.formats.validate import validate
from resu.integrations.finetune import run as run_file
from resu.integrations.finetune.callbacks import Interrupts
from resu.integrations.finetune.checkpoint import read_state, write_state
from resu.integrations.finetune.config import FinetuneConfig
from resu.integrations.finetune.run import Interrupted, finetune
from resu.integrations.folders import alone
from tests.integrations.finetune_models import directory, labelled_file, text_file

METHODS = ["full", "masked", "resu", "qresu", "qresu-selective", "lora", "sparse-lora"]
REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    directory(folder / "llama", "llama", attention_dropout=0.1, tie_word_embeddings=True)
    directory(folder / "bert", "bert-body")
    directory(folder / "masked", "bert")
    labelled_file(folder / "train.txt", 96)
    labelled_file(folder / "dev.txt", 24, seed=1)
    text_file(folder / "words.txt", 160)
    return folder


def settings(place: Path, method: str = "resu", kind: str = "llama", **changes: Any) -> FinetuneConfig:
    given: dict[str, Any] = {"method": method, "steps": 6, "batch_size": 4, "length": 16, "rank": 2, "device": "cpu"}
    given |= {"source": place / kind, "learning_rate": 1e-2}
    if kind == "bert":
        given |= {"task": "classification", "data": place / "train.txt", "validation": place / "dev.txt"}
    else:
        given["data"] = place / "words.txt"
    if method not in ("full", "lora"):
        given["sparsity"] = 0.5
    return FinetuneConfig(**{**given, **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    shards = Shards.open(folder)
    return {name: shards.read(name) for name in shards.names}


def same(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def stopping(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Have the next runs hear an interrupt during this step."""

    class Early(Interrupts):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == at - 1:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(run_file, "Interrupts", Early)


def test_labels_that_do_not_fit_are_named(place: Path, tmp_path: Path) -> None:
    one = tmp_path / "one.txt"
    one.write_text((place / "train.txt").read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match=r"one label only|too few|at least"):
        finetune(settings(place, kind="bert", data=one, validation=None), tmp_path / "a")
    finetune(settings(place, "full", "bert", steps=1), tmp_path / "tuned")
    other = tmp_path / "other.txt"
    lines = [line.split(" ", 1) for line in (place / "train.txt").read_text().splitlines()]
    other.write_text("".join(f"new{label} {text}\n" for label, text in lines))
    with pytest.raises(ValueError, match="labels that the training data does not have: new"):
        finetune(settings(place, kind="bert", validation=other), tmp_path / "b")
    again = settings(place, "full", "bert", source=tmp_path / "tuned", data=other, validation=other)
    with pytest.raises(ValueError, match="the model's head was made for the classes"):
        finetune(again, tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.txt", "other.txt", "tuned"]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_stopped_anywhere_equals_the_uninterrupted_one(
    place: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"accumulate": 1 if method == "qresu-selective" else 2, "schedule": "cosine"}
    if method == "qresu":
        options |= {"optimizer": "adamw8bit", "theta_dtype": "bfloat16"}
    whole = finetune(settings(place, method, **options), tmp_path / "whole")
    stopping(monkeypatch, 4)
    with pytest.raises(Interrupted, match="stopped after step 4 of 6"):
        finetune(settings(place, method, **options), tmp_path / "parts")
    assert whole["evaluation"]["end"]["loss"] < whole["evaluation"]["start"]["loss"]
    assert not (tmp_path / "parts").exists()
    work = tmp_path / "parts.training"
    assert {p.name for p in work.iterdir()} >= {"settings.json", "start.json", "log.csv", "checkpoint-4"}
    assert not list(work.rglob("training_args.bin"))
    monkeypatch.undo()
    torch.manual_seed(99)  # what a process draws before does not matter
    again = finetune(settings(place, method, **options), tmp_path / "parts", resume=True)
    assert same(tmp_path / "whole", tmp_path / "parts")
    assert again["evaluation"] == whole["evaluation"]
    assert (tmp_path / "whole" / "log.csv").read_text() == (tmp_path / "parts" / "log.csv").read_text()
    assert not work.exists()


@pytest.mark.parametrize("method", METHODS)
def test_what_is_written_loads_and_is_what_was_measured(place: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "out"
    report = finetune(settings(place, method, kind="bert"), out)
    assert report == json.loads((out / "run.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.id2label == {0: "neg", 1: "pos"}
    right = 0
    for line in (place / "dev.txt").read_text().splitlines():
        label, text = line.split(" ", 1)
        with torch.no_grad():
            right += model.config.id2label[int(model(**tokenizer(text, return_tensors="pt")).logits.argmax())] == label
    assert right / 24 == report["evaluation"]["saved"]["accuracy"]
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))
    found = validate(out)
    assert found["ok"], found["violations"]
    sparse = method in ("masked", "sparse-lora")
    assert (out / "masks.safetensors").is_file() == sparse
    assert report["sparsity"] == (0.5 if sparse else 0.0)
    assert report["memory"]["peak"] == report["memory"]["state"] + report["memory"]["step"]
    assert report["memory"]["state"] == sum(report["memory"]["kinds"].values())
    assert 0 < report["trained"] <= report["parameters"]
    with open(out / "log.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 7))
    assert all(float(row["loss"]) > 0 for row in rows)
    assert not list(out.rglob("*.bin"))


def test_a_result_is_gone_on_with_and_keeps_its_mask_and_labels(place: Path, tmp_path: Path) -> None:
    first = finetune(settings(place, "masked", kind="bert"), tmp_path / "first")
    masks = read_masks(tmp_path / "first" / "masks.safetensors")[0]
    again = settings(place, "sparse-lora", kind="bert", source=tmp_path / "first", sparsity=None)
    report = finetune(again, tmp_path / "second")
    assert read_masks(tmp_path / "second" / "masks.safetensors")[0] == masks
    assert report["evaluation"]["source"] == pytest.approx(first["evaluation"]["saved"], rel=1e-5)  # its head too
    assert validate(tmp_path / "second")["ok"]
    assert {p.name for p in (tmp_path / "second").iterdir()} == {p.name for p in (tmp_path / "first").iterdir()}


def test_a_mask_that_is_given_up_is_said(place: Path, tmp_path: Path) -> None:
    finetune(settings(place, "masked", steps=1), tmp_path / "sparse")
    for method, says in (("full", "knows no mask"), ("resu", "commit sparse or amnesty keeps its count")):
        config = settings(place, method, source=tmp_path / "sparse", sparsity=None, steps=1)
        assert says in finetune(config, tmp_path / method)["notes"][0]
        assert not (tmp_path / method / "masks.safetensors").exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    write_state(nn.Linear(3, 2), tmp_path)
    for other in (nn.Linear(3, 2, bias=False), nn.Linear(4, 2), nn.Sequential(nn.Linear(3, 2))):
        with pytest.raises(FileFormatError, match="is of another model"):
            read_state(other, tmp_path)


def test_masked_language_models_and_commits(place: Path, tmp_path: Path) -> None:
    report = finetune(settings(place, "resu", "masked", commit="amnesty", steps=12), tmp_path / "out")
    assert (report["task"], report["evaluation"]["metric"]) == ("masked-lm", "perplexity")
    assert report["evaluation"]["start"] == report["evaluation"]["source"]  # θ starts as the weights
    assert report["evaluation"]["end"]["loss"] < report["evaluation"]["start"]["loss"]
    assert report["sparsity"] == 0.5
    assert validate(tmp_path / "out", sparsity=0.5)["ok"]


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("resu", {"autocast": "bfloat16"}),
        ("qresu", {"dtype": "bfloat16"}),
        ("resu", {"optimizer": "adafactor"}),
        ("sparse-lora", {"optimizer": "sgd", "bits": 4}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_other_ways_to_compute(place: Path, tmp_path: Path, method: str, changes: dict[str, Any]) -> None:
    report = finetune(settings(place, method, compare=False, **changes), tmp_path / "out")
    assert report["evaluation"]["end"]["loss"] < report["evaluation"]["start"]["loss"]
    dtype = getattr(torch, changes.get("dtype", "float32"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype


@pytest.mark.parametrize("method", ["full", "masked", "resu", "qresu", "qresu-selective", "lora", "sparse-lora"])
def test_float16_is_trained_by_what_can(place: Path, tmp_path: Path, method: str) -> None:
    config = settings(place, method, dtype="float16", learning_rate=1e-3)
    if method in ("full", "masked", "resu", "qresu"):
        with pytest.raises(ValueError, match="adamw cannot train values of float16"):
            finetune(config, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        config = settings(place, method, dtype="float16", learning_rate=1e-3, optimizer="adamw8bit")
    report = finetune(config, tmp_path / "out")
    assert report["evaluation"]["end"]["loss"] < report["evaluation"]["start"]["loss"]
    assert all(weight.dtype is torch.float16 for weight in weights(tmp_path / "out").values())


def test_gradient_checkpointing_changes_no_bit(place: Path, tmp_path: Path) -> None:
    finetune(settings(place, "qresu"), tmp_path / "a")
    finetune(settings(place, "qresu", gradient_checkpointing=True), tmp_path / "b")
    assert same(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("method", ["full", "qresu"])
def test_updates_within_the_backward_pass_change_no_bit(place: Path, tmp_path: Path, method: str) -> None:
    plain = finetune(settings(place, method, clip=0.0), tmp_path / "a")
    within = finetune(settings(place, method, clip=0.0, in_backward=True), tmp_path / "b")
    assert same(tmp_path / "a", tmp_path / "b")
    assert within["memory"]["step"] <= plain["memory"]["step"]


def test_weights_lie_in_shards_and_the_adapter_beside(place: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    out = tmp_path / "out"
    config = settings(place, "lora", dropout=0.0)
    finetune(config, out, max_shard_size="10KB", keep_adapter=True)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    base = AutoModelForCausalLM.from_pretrained(place / "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT
        adapted = peft.PeftModel.from_pretrained(base, out / "adapter").eval()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        found = AutoModelForCausalLM.from_pretrained(out)(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_the_source_does_not_come_along(place: Path, tmp_path: Path) -> None:
    finetune(settings(place, "lora", steps=1), tmp_path / "first", keep_adapter=True)
    again = settings(place, "sparse-lora", source=tmp_path / "first", steps=1)
    finetune(again, tmp_path / "second", keep_adapter=True)  # an adapter of its own, not a mixture
    names = {p.name for p in (tmp_path / "second" / "adapter").iterdir()}
    assert names == {"adapter.json", "adapter.safetensors", "masks.safetensors"}
    finetune(settings(place, "masked", source=tmp_path / "second", sparsity=None, steps=1), tmp_path / "third")
    assert not (tmp_path / "third" / "adapter").exists()


def test_two_runs_do_not_share_a_folder(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with alone(out), pytest.raises(FileExistsError, match="another run is making"):
        finetune(settings(place, "full"), out, overwrite=True)
    assert not list(tmp_path.iterdir())


def test_nothing_is_replaced_unasked(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, config = tmp_path / "out", settings(place, steps=2)
    finetune(config, out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="is there already"):
        finetune(config, out)
    finetune(settings(place, steps=3), out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() != before
    with pytest.raises(FileNotFoundError, match="no interrupted run"):
        finetune(config, tmp_path / "new", resume=True)
    stopping(monkeypatch, 1)
    with pytest.raises(Interrupted):
        finetune(config, tmp_path / "new")
    monkeypatch.undo()
    with pytest.raises(FileExistsError, match="holds an interrupted run"):
        finetune(config, tmp_path / "new")
    with pytest.raises(ValueError, match=r"cannot go on so: seed was 0, is 1; steps was 2, is 3"):
        finetune(settings(place, steps=3, seed=1), tmp_path / "new", resume=True)
    (tmp_path / "other.training").mkdir()
    (tmp_path / "other.training" / "mine").touch()
    with pytest.raises(FileExistsError, match="is no earlier run"):
        finetune(config, tmp_path / "other", overwrite=True)
    with pytest.raises(ValueError, match="out must not be the source"):
        finetune(config, place / "llama")


def test_a_checkpoint_that_is_not_whole_or_damaged(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = settings(place, save_steps=2), tmp_path / "out"
    stopping(monkeypatch, 5)
    with pytest.raises(Interrupted):
        finetune(config, out)
    monkeypatch.undo()
    work = tmp_path / "out.training"
    assert sorted(p.name for p in work.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    (work / "checkpoint-5" / "trainer_state.json").unlink()  # killed while it was written
    shutil.copytree(work, tmp_path / "kept")
    finetune(config, out, resume=True)
    finetune(config, tmp_path / "straight")
    assert same(out, tmp_path / "straight")
    shutil.rmtree(out)
    shutil.copytree(tmp_path / "kept", work)
    file = work / "checkpoint-4" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(FileFormatError, match=r"checkpoint-4/model.safetensors is damaged"):
        finetune(config, out, resume=True)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="the checkpoint is not whole"):
        finetune(config, out, resume=True)


def test_a_loss_that_is_no_number_ends_the_run(place: Path, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="try a smaller learning rate"):
        finetune(settings(place, "full", learning_rate=1e30, clip=0.0, steps=20), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_evaluations_and_progress_on_the_way(place: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    config = settings(place, "resu", "bert", evaluate_steps=2)
    report = finetune(config, tmp_path / "out", progress=lambda *about: seen.append(about))
    with open(tmp_path / "out" / "log.csv", encoding="utf-8") as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}
    assert [step for step, row in rows.items() if row["eval_accuracy"]] == [2, 4, 6]
    assert float(rows[6]["eval_loss"]) == pytest.approx(report["evaluation"]["end"]["loss"], rel=1e-6)
    assert ("training" in seen[-1][2]) or ("evaluating" in seen[-1][2])
    assert [done for done, total, what in seen if what.startswith("training")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["resu", "qresu-selective", "masked"])
def test_two_processes_agree_and_resume(place: Path, tmp_path: Path, method: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.integrations.finetune_ranks", str(place), str(tmp_path), method],
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert same(tmp_path / "whole", tmp_path / "parts")
    assert validate(tmp_path / "whole")["ok"]
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["steps"] == 10
