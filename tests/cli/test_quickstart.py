"""`resu quickstart` with a few steps: files, numbers, refusals."""

import json
import math
import re

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from resu.core.counting import keep_count
from resu.experiments import quickstart
from resu.experiments.quickstart import LABELS, SWEEP, compare, load_data
from resu.experiments.verdicts import verdicts

QUICK = ("--steps", 20, "--seeds", 2, "--jobs", 1)
FILES = {
    "accuracy.png",
    "layers.png",
    "masks.safetensors",
    "memory.png",
    "model.safetensors",
    "report.html",
    "results.json",
    "training.png",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("quickstart") / "out"


@pytest.fixture(scope="module")
def document(resu, folder):
    result = resu("quickstart", *QUICK, "--sparsity", "0.9", "--out", folder, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return json.loads(result.stdout)


def test_every_method_is_there_with_every_seed(document):
    assert [row["method"] for row in document["methods"]] == list(LABELS)
    for row in document["methods"]:
        assert len(row["accuracies"]) == 2
        assert row["accuracy_mean"] == pytest.approx(sum(row["accuracies"]) / 2)


def test_sparsity_is_exact_to_one_weight_and_zeros_are_zeros(document):
    for row in document["methods"][1:]:
        assert row["kept"] == keep_count(row["weights"], 0.9), row["method"]
        assert row["zeros_exact"], row["method"]


def test_bytes_are_there_and_sparse_files_are_smaller(document):
    dense, *sparse = document["methods"]
    assert dense["held_bytes"] >= 16 * dense["weights"]
    for row in sparse:
        assert row["held_bytes"] > 0
        assert row["disk_bytes"] < 0.5 * dense["disk_bytes"], row["method"]


def test_the_sweep_has_its_levels(document):
    assert set(document["sweep"]) == set(SWEEP)
    for curve in document["sweep"].values():
        assert sorted(map(float, curve)) == [0.5, 0.8, 0.9, 0.95]


def test_all_files_are_there_and_the_page_needs_no_other(document, folder):
    assert {path.name for path in folder.iterdir()} == FILES
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(modes) == 1, "some files are readable by their owner alone"
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r'(src|href)="(?!data:)', page)
    for row in document["methods"]:
        assert row["label"] in page
    assert json.loads((folder / "results.json").read_text())["methods"] == document["methods"]


def test_the_saved_model_is_the_one_measured(document, folder):
    from resu import load_checkpoint
    from resu.experiments.models import mlp
    from resu.pruning.mask_ops import load_mask

    model = mlp(64, 128, 64, 10)
    load_checkpoint(folder / "model.safetensors", model)
    masks, metadata = load_mask(folder / "masks.safetensors")
    assert metadata["method"] == document["saved"]["method"]
    kept = 0
    for name, mask in masks.items():
        mask = getattr(mask, "mask", mask)
        kept += int(mask.sum())
        assert not model.get_parameter(name)[~mask].any()
    assert kept == keep_count(17024, 0.9)
    right = total = 0
    with torch.no_grad():
        for x, y in load_data("digits", None).evaluation("test"):
            right, total = right + int((model(x).argmax(1) == y).sum()), total + len(y)
    assert 100 * right / total == pytest.approx(document["saved"]["test_accuracy"])


def test_a_second_run_says_what_is_there_and_touches_nothing(document, refused, folder):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    line = refused("quickstart", "--out", folder)
    assert "report.html" in line
    assert "--force" in line
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_the_table_and_what_to_do_next(resu, tmp_path):
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "mine.txt").write_text("kept")
    result = resu("quickstart", "--steps", 20, "--seeds", 1, "--no-sweep", "--jobs", 1, "--out", out, "--force")
    assert result.exit_code == 0, result.output
    for label in LABELS.values():
        assert label in result.stdout
    assert "With one seed" in result.stdout
    assert f"resu inspect {out}" in result.stdout.replace("\n", "")
    assert (out / "mine.txt").read_text() == "kept"


def test_the_same_seeds_give_the_same_numbers_in_any_number_of_processes(monkeypatch):
    some = ("dense", "prune-only", "resu", "qresu-selective")
    monkeypatch.setattr(quickstart, "LABELS", {name: LABELS[name] for name in some})
    data = load_data("digits", None)
    first, second = (compare("digits", data, 0.8, [3], 20, sweep_seeds=0, workers=n) for n in (1, 2))
    for name in some:
        assert torch.equal(first.runs[name][0].correct, second.runs[name][0].correct), name


def test_noise_is_called_noise_and_a_difference_a_difference():
    good = torch.arange(1000) % 100 != 0
    same = torch.arange(1000) % 100 != 1
    bad = torch.arange(1000) % 4 != 0
    best, others = verdicts({"a": [good] * 3, "b": [same] * 3, "c": [bad] * 3})
    assert best in ("a", "b")
    found = {verdict.method: verdict for verdict in others}
    assert found.pop("c").is_noise is False
    assert next(iter(found.values())).is_noise is True
    assert all(math.isfinite(verdict.error) for verdict in others)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--sparsity=-0.1",), "--sparsity"),
        (("--sparsity", "1.0"), "--sparsity"),
        (("--sparsity", "0.5abc"), "0.5abc"),
        (("--sparsity", "nan"), "nan"),
        (("--sparsity", "0"), "removes nothing"),
        (("--data", "mnist"), "known: digits, fashion-mnist"),
        (("--data-dir", "x"), "--data fashion-mnist"),
        (("--data", "fashion-mnist", "--data-dir", "absent"), "absent"),
        (("--seeds", "0"), "--seeds"),
        (("--steps", "3"), "--steps"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing_behind(refused, tmp_path, args, says):
    assert says in refused("quickstart", *args, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "--out" in refused("quickstart", "--out", tmp_path / "file")
    assert "cannot be written" in refused("quickstart", "--out", tmp_path / "file" / "below")


@pytest.mark.parametrize("module", ["matplotlib", "sklearn"])
def test_a_missing_extra_is_named(refused, monkeypatch, tmp_path, module):
    import sys

    monkeypatch.setitem(sys.modules, module, None)
    assert 'pip install "resu-torch[demo]"' in refused("quickstart", "--out", tmp_path / "out")


def test_fashion_mnist_is_read_where_it_lies(resu, data_folder, tmp_path):
    args = ("--steps", 20, "--seeds", 1, "--no-sweep", "--jobs", 1, "--out", tmp_path / "out", "--json")
    result = resu("quickstart", "--data", "fashion-mnist", "--data-dir", data_folder("fashion_mnist"), *args)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["methods"][0]["weights"] == 784 * 300 + 300 * 100 + 100 * 10
    assert found["methods"][0]["accuracy_mean"] > 40
