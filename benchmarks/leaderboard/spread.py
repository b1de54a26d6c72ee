"""How evenly a method spreads its weights over the rows and columns of a layer, from the masks of finished runs.

    python benchmarks/leaderboard/spread.py runs/gpt --out benchmarks/results/leaderboard_spread.csv

The coefficient of variation (standard deviation over mean) of the number of kept weights per output row and per input
column, and the share of empty ones; means over the pruned layers that are not dense, then over seeds.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import torch

from resu.pruning.mask_ops import load_mask

COLUMNS = ("data", "model", "sparsity", "method", "seeds", "row_cv", "column_cv", "empty_rows", "empty_columns")


def spread(mask: torch.Tensor) -> tuple[float, float, float, float]:
    """Of one layer ``[out, in…]``: variation over rows, over columns, empty rows, empty columns."""
    kept = mask.flatten(1).double()
    counts = kept.sum(1), kept.sum(0)
    variation = [float(c.std(correction=0) / c.mean()) for c in counts]
    return (*variation, *(float((c == 0).double().mean()) for c in counts))  # type: ignore[return-value]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs, at any depth")
    parser.add_argument("--out", type=Path, help="a CSV file to write")
    given = parser.parse_args()
    found: dict[tuple[str, str, float, str], list[list[float]]] = defaultdict(list)
    for file in sorted(file for folder in given.runs for file in folder.rglob("masks.safetensors")):
        result = json.loads((file.parent / "result.json").read_text(encoding="utf-8"))
        masks, _ = load_mask(file)
        layers = [spread(mask) for mask in masks.values() if not mask.all()]
        key = (result["data"], result["model"], result["sparsity"], result["method"])
        found[key].append([statistics.fmean(values) for values in zip(*layers, strict=True)])
    rows = [
        (*key, len(seeds), *(round(statistics.fmean(values), 4) for values in zip(*seeds, strict=True)))
        for key, seeds in sorted(found.items())
    ]
    for row in rows:
        print(f"{row[0]:<16} {row[1]:<9} {row[2]:<5g} {row[3]:<10} rows {row[5]:.2f}  columns {row[6]:.2f}")
    if given.out is not None:
        with open(given.out, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
