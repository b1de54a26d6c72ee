"""The benchmarks that are quick enough to be run, small: they must not rot."""

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def rows_of(name, out, *options):
    """What a benchmark writes."""
    command = [sys.executable, BENCHMARKS / name, "--out", out, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with out.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_export(tmp_path):
    pytest.importorskip("transformers")
    (row,) = rows_of("bench_export.py", tmp_path / "export.csv", "--models", "random Llama", "--weights", "1e5")
    assert (row["to"], row["dtype"]) == ("pack-quantized", "bfloat16")
    assert 4 + 16 / 128 < float(row["bits"]) < 4.14  # a scale for 128 codes, and the shape of each weight
    assert 0.1 < float(row["error"]) < 0.12  # of normal weights, 128 to a scale
    assert float(row["peak_mb"]) >= 0


@pytest.mark.slow
def test_finetune_in_two_processes(tmp_path):
    pytest.importorskip("accelerate")
    sizes = ["--methods", "full", "--width", "64", "--blocks", "2", "--length", "16"]
    whole, parts = rows_of("bench_finetune_shard.py", tmp_path / "shard.csv", *sizes)
    assert (whole["shard"], parts["shard"]) == ("False", "True")
    assert float(parts["state_mb"]) < 0.55 * float(whole["state_mb"])
    assert float(whole["peak_mb"]) > float(whole["state_mb"]) > 12e-6 * int(whole["parameters"])


def test_global_ranking(tmp_path, data_folder):
    data_folder("model_resnet_cifar10")
    found = rows_of("bench_global_ranking.py", tmp_path / "layers.csv", "--scores", "magnitude")
    with (BENCHMARKS / "results" / "global_ranking.csv").open() as file:
        known = [row for row in csv.DictReader(file) if row["score"] == "magnitude"]
    assert [(row["layer"], row["kept"]) for row in found] == [(row["layer"], row["kept"]) for row in known]
    assert sum(int(row["kept"]) for row in found) == -(-3 * sum(int(row["weights"]) for row in found) // 10)


def test_latency_targets_without_a_clock(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("bench_latency_targets")
    asked = []

    def found(way, batch, target):
        asked.append((way, batch, target))
        return 1.04 * target, iter([0.5 * target, 1.06 * target, 2 * target]).__next__

    monkeypatch.setattr(module, "WAYS", dict.fromkeys(module.WAYS, found))
    out = str(tmp_path / "targets.csv")
    assert module.main(["--out", out, "--models", module.RESNET, "--ways", "blocks"]) == 0
    assert asked == [("blocks", batch, target) for batch in (1, 16) for target in (0.7, 0.5)]
    assert module.main(["--out", out]) == 0  # what is there is not run again
    assert len(asked) == len(module.SETTINGS) == len(module.read(out, module.Row))
    row = module.read(out, module.Row)[0]
    assert (row.found, row.met, row.again, row.met_again) == (0.728, True, "0.350 0.742 1.400", False)
    assert "met 10 and, measured again, 0 of 10" in capsys.readouterr().out
    shown = module.tables(out)["targets"].splitlines()
    assert shown[2] == "| ResNet-56 | blocks | 1 image | 0.7x | 0.73x | 0.35, 0.74, 1.40 |"
    assert len(shown) == 12


def test_spinn_latency(tmp_path):
    found = rows_of("bench_spinn_latency.py", tmp_path / "latency.csv", "--hidden", "32", "32", "--rounds", "3")
    assert [row["network"] for row in found] == ["dense", "zeros in place", "neurons removed", "packed in rows"]
    dense, zeros, smaller, packed = (int(row["parameters"]) for row in found)
    assert zeros == packed < dense
    assert smaller <= 0.3 * dense
    assert float(found[2]["difference"]) < 1e-12


def test_sparse_training(tmp_path):
    small = "--networks gpt --batch 1 --optimizers adamw --rules static rigl srigl resu --interval 4 --rounds 20"
    out = tmp_path / "times.csv"
    # Without a folder of other libraries these are left out.
    found = rows_of("bench_sparse_training.py", out, *small.split())
    rows = {(row["library"], row["rule"]): row for row in found}
    assert len(rows) == 2 + 4
    assert all(float(row["between_median"]) > 0 and not row["note"] for row in rows.values())
    assert {rule for (_, rule), row in rows.items() if row["update_median"]} == {"rigl", "srigl", "resu"}
    with out.with_name("times_facts.csv").open() as file:
        facts = list(csv.DictReader(file))
    assert [row["rule"] for row in facts] == ["rigl", "set"]
    for row in facts:
        assert row["kept"] == row["asked"]
        assert row["takes_closure"] == "yes"
        assert int(row["grown"]) == int(row["dropped"]) > 0
        wrong = ("not_zero", "grown_with_state", "dropped_with_state", "others_state_changed", "norms_and_embeddings")
        assert all(row[name] == "0" for name in wrong)
