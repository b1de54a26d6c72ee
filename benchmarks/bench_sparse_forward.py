"""Inference of one SPARSE layer: torch's CSR product against the dense one. Where `sparse_threshold="auto"` comes from.

    python benchmarks/bench_sparse_forward.py

Each CSR call is timed in turn with the dense one; the ratio CSR / dense is given as median and 75th percentile over
rounds (a threshold must hold on bad days too). Several layers take turns, so that caches hold no weight.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from machine import machine, write_rows
from resu import RESULinear


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 4096])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.8, 0.9, 0.95, 0.99])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 32, 128, 512])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sparse_forward.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for width in args.widths:
        for sparsity in args.sparsities:
            layers = []
            for _ in range(max(2, min(16, (1 << 25) // width**2))):
                layer = RESULinear(width, width, sparse_threshold=0.0)
                layer.set_mask(torch.rand(width, width) >= sparsity)
                layers.append(layer)
            for batch in args.batches:
                x = torch.randn(batch, width)
                ratios, dense_ms = [], []
                with torch.no_grad():
                    for turn in range(args.rounds + 1):
                        layer = layers[turn % len(layers)]
                        layer(x)  # the packed form exists
                        start = time.perf_counter()
                        layer(x, use_sparse=False)
                        middle = time.perf_counter()
                        layer(x)
                        end = time.perf_counter()
                        if turn:
                            ratios.append((end - middle) / (middle - start))
                            dense_ms.append(1e3 * (middle - start))
                ratios.sort()
                row = {
                    "width": width,
                    "sparsity": sparsity,
                    "batch": batch,
                    "ratio_median": round(statistics.median(ratios), 3),
                    "ratio_p75": round(ratios[3 * len(ratios) // 4], 3),
                    "dense_ms": round(statistics.median(dense_ms), 3),
                    "threads": args.threads,
                }
                print(*row.values(), flush=True)
                rows.append({**row, **machine()})
    write_rows(args.out, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
