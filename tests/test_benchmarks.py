"""The benchmarks that are quick enough to be run, small: they must not rot."""

import csv
import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_sparse_training(tmp_path):
    small = "--networks gpt --batch 1 --optimizers adamw --rules static rigl srigl resu --interval 4 --rounds 20"
    out = tmp_path / "times.csv"
    command = [sys.executable, BENCHMARKS / "bench_sparse_training.py", *small.split(), "--out", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # Without a folder of other libraries these are left out.
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    with out.open() as file:
        rows = {(row["library"], row["rule"]): row for row in csv.DictReader(file)}
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
