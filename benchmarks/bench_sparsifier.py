"""What a training step costs under the ``Sparsifier``, against the same step without it.

    python benchmarks/bench_sparsifier.py

Networks with equal weights train side by side, one step after the other in turn, with fused Adam and one thread; each
step is compared with the dense step of the same round, for shared machines drift and ratios within a round do not.
``tournament every n`` is the RESU rule with that interval: most of its steps cost what ``static`` costs, and every n-th
one more.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from machine import machine, write_rows
from resu.training import RESU, Algorithm, Sparsifier, Static

RULES: dict[str, Algorithm | None] = {
    "dense": None,
    "static": Static(sparsity=0.9),
    "tournament every 16": RESU(sparsity=0.9, initial_sparsity=None, interval=16),
    "tournament every 2": RESU(sparsity=0.9, initial_sparsity=None, interval=2),
    "tournament every 1": RESU(sparsity=0.9, initial_sparsity=None, interval=1),
}


def network(sizes: list[int], device: str) -> nn.Sequential:
    """ReLU layers of these widths, the same weights each time."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).to(device)


def measure(sizes: list[int], batch: int, rounds: int, device: str) -> list[dict[str, object]]:
    """Rows of one network."""
    runs = {}
    for name, rule in RULES.items():
        model = network(sizes, device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        driver = None if rule is None else Sparsifier(model, optimizer, rule)
        runs[name] = (model, optimizer, driver)
    x = torch.randn(batch, sizes[0], device=device)
    y = torch.randint(sizes[-1], (batch,), device=device)

    def step(name: str) -> float:
        model, optimizer, _ = runs[name]
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    times: dict[str, list[float]] = {name: [] for name in RULES}
    for i in range(rounds + 16):
        for name in RULES:
            seconds = step(name)
            if i >= 16:
                times[name].append(seconds)
    weights = sum(a * b for a, b in pairwise(sizes))
    rows = []
    for name, values in times.items():
        # Means over 16 rounds hold as many tournaments as the interval says; a median of single steps would hide them.
        chunks = range(0, rounds - 15, 16)
        ratios = sorted(sum(values[i : i + 16]) / sum(times["dense"][i : i + 16]) for i in chunks)
        rows.append(
            {
                "network": "-".join(map(str, sizes)),
                "weights": weights,
                "batch": batch,
                "rule": name,
                "ratio_mean": round(statistics.median(ratios), 3),
                "ratio_p25": round(ratios[len(ratios) // 4], 3),
                "ms_median": round(1e3 * statistics.median(values), 2),
                "rounds": rounds,
                "cpu": torch.cuda.get_device_name() if device == "cuda" else machine()["cpu"],
                "torch": torch.__version__,
            }
        )
    return rows


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=160, help="steps of each network; at least 16")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sparsifier.csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure([784, 300, 100, 10], 128, options.rounds, options.device)
    rows += measure([1024, 1024, 1024, 10], 512, options.rounds, options.device)
    write_rows(options.out, rows)
    for row in rows:
        print(f"{row['network']:<20} {row['rule']:<20} {row['ratio_mean']:>6}x dense  {row['ms_median']:>8} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
