"""Sweeps: which runs a grid has, that finished ones are skipped, that a failing one stops no other."""

import json
import subprocess
import sys

import pytest

from resu.experiments.sweep import plan, sweep, without
from resu.experiments.train import ConfigError, read_result
from resu.experiments.train.typed import plain

pytest.importorskip("sklearn")

BASE = {
    "data": "digits",
    "model": {"name": "mlp", "hidden": [16]},
    "steps": 20,
    "batch_size": 32,
    "log": {"every": 10, "checkpoint_every": 0},
}


def grid(tmp_path, **values):
    path = tmp_path / "grid.json"
    path.write_text(json.dumps({"base": BASE, **values}))
    return path


def test_a_grid_is_every_combination_once(tmp_path):
    (tmp_path / "base.yaml").write_text("data: digits\nmodel: mlp\nsteps: 20\n")
    (tmp_path / "grid.yaml").write_text(
        "base: base.yaml\n"
        "set: {steps: 30, optimizer.lr: 0.01, optimizer: {name: sgd}}\n"
        "grid:\n"
        "  method: [dense, set, {name: rigl, interval: 50, label: slow}]\n"
        "  method.sparsity: [0.8, 0.9]\n"
        "  seed: [0, 1]\n"
    )
    runs = plan(tmp_path / "grid.yaml")
    assert [run.name for run in runs] == [
        f"{method},sparsity={sparsity},seed={seed}"
        for method, sparsities in (("dense", [0.0]), ("set", [0.8, 0.9]), ("slow", [0.8, 0.9]))
        for sparsity in sparsities
        for seed in (0, 1)
    ]
    values = plain(runs[-1].config)
    assert (values["steps"], values["optimizer"]["lr"], values["optimizer"]["name"]) == (30, 0.01, "sgd")
    assert values["method"]["interval"] == 50
    assert "interval" not in plain(runs[2].config)["method"]


def test_several_grids_and_none(tmp_path):
    two = plan(grid(tmp_path, grid=[{"seed": [0, 1]}, {"seed": [1, 2]}]))
    assert [run.name for run in two] == ["seed=0", "seed=1", "seed=2"]
    assert [run.name for run in plan(grid(tmp_path))] == ["run"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"gird": {}}, "unknown key 'gird' in .*did you mean 'grid'"),
        ({"grid": {"method.sparsity": [0.5], "sed": [1]}}, "unknown key 'sed' in the configuration"),
        (
            {"grid": {"method": [{"name": "set", "sparsity": 0.5}, {"name": "set", "sparsity": 0.6}]}},
            "the same name 'set'",
        ),
        ({"set": [1]}, "set must be a mapping"),
    ],
)
def test_a_grid_that_cannot_be_meant_is_refused_before_anything_runs(tmp_path, values, said):
    with pytest.raises(ConfigError, match=said):
        plan(grid(tmp_path, **values))


def test_runs_are_done_once_and_a_failing_one_stops_no_other(tmp_path, capsys):
    path = grid(tmp_path, grid={"model": ["lenet5", "mlp"], "seed": [0]}, set={"model": {"name": "mlp"}})
    values = json.loads(path.read_text())
    del values["base"]["model"]["hidden"]
    path.write_text(json.dumps(values))
    runs = plan(path)
    failed = sweep(runs, tmp_path / "out", jobs=2)
    assert set(failed) == {"lenet5,seed=0"}
    assert "model 'lenet5' is for images of 28x28" in failed["lenet5,seed=0"]
    assert "lenet5" in (tmp_path / "out" / "lenet5,seed=0" / "error.txt").read_text()
    result = tmp_path / "out" / "mlp,seed=0" / "result.json"
    before = result.read_bytes()
    assert read_result(result).steps == 20
    assert "[2/2]" in capsys.readouterr().out
    assert sweep([run for run in runs if "mlp" in run.name], tmp_path / "out") == {}
    assert "1 runs, 1 finished before" in capsys.readouterr().out
    assert result.read_bytes() == before


def test_the_command_lists_runs_and_says_what_is_wrong_in_one_line(tmp_path):
    def call(*args):
        return subprocess.run(
            [sys.executable, "-m", "resu.experiments.sweep", *map(str, args)],
            capture_output=True,
            text=True,
            timeout=120,
        )

    done = call(grid(tmp_path, grid={"seed": [0, 1]}), "--out", tmp_path / "o", "--list")
    assert (done.returncode, done.stdout, done.stderr) == (0, "seed=0\nseed=1\n", "")
    assert not (tmp_path / "o").exists()
    done = call(tmp_path / "nowhere.json", "--out", tmp_path / "o")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_what_has_a_row_is_not_run_again(tmp_path):
    path = grid(tmp_path, grid={"method": ["dense", "static"], "method.sparsity": [0.5], "seed": [0, 1]})
    sweep(plan(path)[:3], tmp_path / "runs")
    rows = [read_result(file) for file in (tmp_path / "runs").rglob("result.json")]
    assert [run.name for run in without(plan(path), rows)] == [plan(path)[3].name]
    longer = grid(tmp_path, set={"steps": 30}, grid={"method": ["dense", "static"], "method.sparsity": [0.5]})
    assert len(without(plan(longer), rows)) == 2
    other = grid(tmp_path, set={"optimizer.lr": 0.5}, grid={"method": ["dense"]})
    assert len(without(plan(other), rows)) == 1
