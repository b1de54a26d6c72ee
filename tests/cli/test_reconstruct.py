"""`resu reconstruct`: a repaired directory, a report for people and one for machines, one line for what is refused."""

import json

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

from resu.formats.validate import validate
from resu.integrations.hf_prune import prune_directory


@pytest.fixture(scope="module")
def half(stories, tmp_path_factory):
    folder = tmp_path_factory.mktemp("half") / "pruned"
    prune_directory(stories, folder, 0.5, exclude="*.mlp.*")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("Once upon a time there was a little girl named Lily. She liked to play with her cat. " * 8)
    return file


def options(stories, text, out):
    return (
        *("--dense", stories, "--calibration", text, "--samples", 4, "--length", 16, "--batch-size", 2),
        *("--epochs", 1, "--out", out),
    )


def test_a_table_then_json(resu, refused, half, stories, text, tmp_path):
    shown = resu("reconstruct", half, *options(stories, text, tmp_path / "out"))
    assert shown.exit_code == 0, shown.output
    assert shown.stderr == ""
    assert "model.layers.4" in shown.stdout
    assert "sparsity 50.00 %" in shown.stdout
    assert validate(tmp_path / "out")["ok"]
    again = ("reconstruct", half, *options(stories, text, tmp_path / "out"))
    assert "--force" in refused(*again)
    report = json.loads(resu(*again, "--force", "--json").stdout)
    assert len(report["reconstruction"]["blocks"]) == 5
    assert report["out"] == str(tmp_path / "out")


def test_what_is_refused_in_one_line(refused, half, stories, text, tmp_path):
    rest = options(stories, text, tmp_path / "out")
    assert "no file or folder" in refused("reconstruct", tmp_path / "absent", *rest)
    assert "no mask file" in refused("reconstruct", stories, *rest)
    assert "'kept', 'theta', 'lora'" in refused("reconstruct", half, *rest, "--train", "all")
    assert "lr" in refused("reconstruct", half, *rest, "--lr", "-1")
    assert "--device" in refused("reconstruct", half, *rest, "--device", "tpu9")
    assert not (tmp_path / "out").exists()
