"""The benchmark of sparse LoRA, run small: it must not rot, and what it says of memory must hold."""

import csv
import os
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "bench_sparse_lora.py"


def test_runs_and_keeps_no_dense_weight(tmp_path):
    out = tmp_path / "times.csv"
    methods = ["sparse_to_dense", "sparse_to_sparse", "scale", "sparse_to_sparse_4bit", "dense_weff"]
    small = f"--width 2048 --layers 1 --batch 4 --rounds 2 --out {out} --methods".split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARK), *small, *methods]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    with out.open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == methods
    assert all(float(row["ms_median"]) > 0 for row in rows.values())
    weight = 2048**2 * 4 / 2**20
    peak = {method: float(row["peak_mib"]) for method, row in rows.items()}
    assert peak["dense_weff"] > weight
    assert max(peak["sparse_to_sparse"], peak["scale"]) < 0.6 * weight
    assert float(rows["sparse_to_sparse_4bit"]["held_mib"]) < 0.15 * weight
