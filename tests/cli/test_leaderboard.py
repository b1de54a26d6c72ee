"""`resu leaderboard`: what it prints and writes, and what it refuses."""

import dataclasses
import json

import pytest

pytest.importorskip("typer")

from resu.experiments.rows import read
from resu.experiments.train import Result
from resu.experiments.train.result import write_json
from tests.experiments.test_board import DENSE, row


@pytest.fixture
def runs(tmp_path):
    """Three runs of two methods, dense ones, and one that has only begun."""
    results = [row(seed=0), row(seed=1, test=93.0), row(method="set", settings="set erk", test=94.5), *DENSE]
    for i, result in enumerate(results):
        (tmp_path / "runs" / str(i)).mkdir(parents=True)
        write_json(tmp_path / "runs" / str(i) / "result.json", {**dataclasses.asdict(result), "config": {}})
    (tmp_path / "runs" / "begun").mkdir()
    write_json(tmp_path / "runs" / "begun" / "config.json", {})
    return tmp_path / "runs"


def test_it_prints_one_line_per_method_and_sparsity(resu, runs):
    result = resu("leaderboard", runs)
    assert result.exit_code == 0
    assert result.stderr == ""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert [cell[:3] + cell[4:7] for cell in cells] == [
        ["0 %", "dense", "95.50 ± 0.71", "2", "1", "1"],
        ["90 %", "set", "94.50", "1", "0.12", "0.1"],
        ["90 %", "rigl", "92.00 ± 1.41", "2", "0.12", "0.1"],
    ]
    assert "1 run(s) without a result left out" in result.stdout


def test_json_is_one_document(resu, runs):
    document = json.loads(resu("leaderboard", runs, "--json").stdout)
    assert (document["runs"], document["unfinished"], document["out"]) == (5, 1, None)
    (table,) = document["tables"]
    assert table["title"] == "mlp on digits, from scratch, 100 steps"
    assert [(line["method"], line["mean"], line["best"]) for line in table["lines"]] == [
        *[("dense", 95.5, False), ("set", 94.5, True), ("rigl", 92.0, False)]
    ]


def test_it_writes_what_it_reads_again(resu, refused, runs, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "board"
    result = resu("leaderboard", runs, "--out", out)
    assert result.exit_code == 0, result.output
    names = ("leaderboard.md", "leaderboard.csv", "rows.csv", "accuracy_sparsity.png", "accuracy_flops.png")
    assert {file.name for file in out.iterdir()} == set(names)
    assert f"In {out}/: {', '.join(names)}" in result.stdout
    rows = read(out / "rows.csv", Result)
    assert len(rows) == 5
    assert resu("leaderboard", out / "rows.csv", "--json").stdout.replace('"unfinished": 0', '"unfinished": 1') == (
        resu("leaderboard", runs, "--json").stdout
    )
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert "leaderboard.md exists; pass --force" in refused("leaderboard", runs, "--out", out)
    assert before == {file.name: file.read_bytes() for file in out.iterdir()}
    again = resu("leaderboard", out / "rows.csv", "--out", out, "--force")  # rows outlive the runs
    assert again.exit_code == 0
    assert before == {file.name: file.read_bytes() for file in out.iterdir()}


def test_bad_input_is_one_line(refused, tmp_path, runs):
    assert "is neither a folder of runs nor a .csv" in refused("leaderboard", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "no result.json in" in refused("leaderboard", tmp_path / "empty")
    (tmp_path / "rows.csv").write_text("a,b\n")
    assert "has the columns a, b" in refused("leaderboard", tmp_path / "rows.csv")
    assert "is a file; name a folder" in refused("leaderboard", runs, "--out", tmp_path / "rows.csv")
