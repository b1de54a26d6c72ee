"""What one ranking over all layers leaves of each layer of ResNet-20, by score.

    python benchmarks/bench_global_ranking.py

One shot at 70 % with `distribution="global"`, statistics of inputs of 300 training images, as in the table of
`python -m resu.experiments.toolbox`. Nothing is timed, so any machine will do.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from machine import machine
from resu.experiments.data.dataset import Images
from resu.experiments.data.folder import find_file, find_folder
from resu.experiments.data.sources import load
from resu.experiments.models import load_resnet
from resu.experiments.rows import as_csv
from resu.pruning.importance import importances
from resu.pruning.pruners import MagnitudePruner


@dataclass(frozen=True)
class Row:
    """One layer under one score; a line of the CSV."""

    score: str
    sparsity: float
    layer: str
    weights: int
    kept: int
    kept_percent: float
    cpu: str
    torch: str


def layers(score: str, sparsity: float) -> list[Row]:
    """Every layer of the network pruned by one score."""
    seen = None
    if importances[score].needs:
        data = load("cifar10")
        assert isinstance(data, Images)
        seen = tuple(data.batches(seed=0, batch_size=100, steps=3))
    model = load_resnet(find_file(find_folder("model_resnet_cifar10"), ["resnet20.npz"])).eval()
    pruner = MagnitudePruner(
        sparsity, pattern="tensor", importance=score, distribution="global", calibration=seen, seed=0
    )
    return [
        Row(
            *(score, sparsity, name, mask.numel(), int(mask.sum())),
            kept_percent=round(100 * float(mask.double().mean()), 2),
            cpu=machine()["cpu"],
            torch=torch.__version__,
        )
        for name, mask in pruner.prune(model).items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", nargs="+", default=["magnitude", "wanda", "ria"])
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/global_ranking.csv"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [row for score in given.scores for row in layers(score, given.sparsity)]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(as_csv(rows), encoding="utf-8")
    for row in rows:
        print(f"{row.score:<10} {row.layer:<28} {row.kept_percent:6.2f} % of {row.weights}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
