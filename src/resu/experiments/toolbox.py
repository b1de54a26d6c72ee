"""What the pruning toolbox does to a real network: ResNet-20 on CIFAR-10, one shot, no fine-tuning.

``python -m resu.experiments.toolbox --csv benchmarks/results/resnet20_pruning.csv`` runs what is not yet in that file;
with ``--page docs/pruners.md`` it writes the tables and the plot of what is there.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resu.core.counting import check_sparsity, keep_count
from resu.experiments import rows
from resu.experiments.data import DataError, Images, load
from resu.experiments.data.folder import find_file, find_folder
from resu.experiments.models import load_resnet
from resu.pruning.importance import importances
from resu.pruning.pruners import MagnitudePruner
from resu.pruning.sensitivity import Sensitivity, sensitivity_scan

__all__ = ["ALLOCATIONS", "SCORES", "Result", "main", "recalibrate", "study"]

SCORES = ("magnitude", "taylor", "wanda", "ria", "random")
ALLOCATIONS = ("uniform", "erk", "global")
SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9)
SCAN = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95)

Job = tuple[str, str, float, int]  # score, allocation, sparsity, seed


@dataclass(frozen=True)
class Result:
    """One pruned network.

    Attributes:
        accuracy: Percent of the test images, with the running statistics of the trained network.
        recalibrated: The same after BatchNorm statistics were taken again on training images.
        kept: Weights kept, of ``numel``.
        exact: Whether the count is exact and every pruned weight is +0.0.
        images: Test images.
        recipe: What else the figures depend on.
    """

    score: str
    allocation: str
    sparsity: float
    seed: int
    accuracy: float
    recalibrated: float
    kept: int
    numel: int
    exact: bool
    images: int
    seconds: float
    recipe: str
    torch: str

    @property
    def key(self) -> tuple[object, ...]:
        """What makes a row the same run."""
        return self.score, self.allocation, self.sparsity, self.seed, self.images, self.recipe


@dataclass(frozen=True)
class _Setup:
    """The network and the images that all runs share."""

    model: nn.Module
    test: tuple[Tensor, Tensor]
    calibration: tuple[tuple[Tensor, Tensor], ...]
    recipe: str


def _setup(images: int, calibration: int, directory: str | None) -> _Setup:
    weights = find_file(find_folder("model_resnet_cifar10", directory), ["resnet20.npz"])
    data = load("cifar10", directory)
    assert isinstance(data, Images)
    count = len(data.test)
    if not 1 <= images <= count:
        raise DataError(f"there are {count} test images, cannot evaluate on {images}")
    # Files may be sorted by class: images are taken evenly.
    some = torch.arange(images) * count // images
    x = data.scaled(data.test.x[some]).contiguous(memory_format=torch.channels_last)
    batches = tuple(data.batches(seed=0, batch_size=100, steps=calibration // 100))
    model = load_resnet(weights).eval()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return _Setup(model, (x, data.test.y[some]), batches, f"resnet20 one-shot calibration={calibration}")


@torch.no_grad()
def accuracy(model: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    """Percent of images that are classified as labelled."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(*(t.split(100) for t in test), strict=True))
    return 100 * right / len(test[1])


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Take the running statistics of every BatchNorm again, as the plain mean over ``batches``; nothing is trained.

    Pruning changes what a BatchNorm sees, and its old statistics cost more accuracy than the weights do.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    training = model.training
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean
        norm.train()
    for x, _ in batches:
        model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(training)


def _loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _run(setup: _Setup, job: Job, scan: Callable[[], Sensitivity]) -> Result:
    score, allocation, sparsity, seed = job
    model, began = deepcopy(setup.model), time.perf_counter()
    kept = numel = 0
    exact = True
    if sparsity > 0:
        needs = importances[score].needs
        pruner = MagnitudePruner(
            sparsity,
            pattern="tensor",  # one comparison group for all, so that what differs is the score and the budget
            importance=score,
            distribution=scan().allocation if allocation == "sensitivity" else allocation,
            calibration=setup.calibration if needs else None,
            loss_fn=_loss if "grads" in needs else None,
            seed=seed,
        )
        masks = pruner.prune(model)
        kept, numel = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
        exact = kept == keep_count(numel, sparsity) and not any(
            bool(model.get_parameter(n)[~m].view(torch.int32).any()) for n, m in masks.items()
        )
    first = accuracy(model, setup.test)
    recalibrate(model, setup.calibration)
    return Result(
        *(score, allocation, sparsity, seed, first, accuracy(model, setup.test), kept, numel, exact),
        images=len(setup.test[1]),
        seconds=round(time.perf_counter() - began, 2),
        recipe=setup.recipe,
        torch=torch.__version__,
    )


def jobs(
    scores: Sequence[str], allocations: Sequence[str], sparsities: Sequence[float], seeds: Sequence[int]
) -> list[Job]:
    """All runs: the dense network once, each score under each budget, random scores for every seed, and magnitude under
    the budget of a sensitivity scan.
    """
    found: list[Job] = [("dense", "dense", 0.0, 0)]
    for sparsity, score, allocation in itertools.product(sparsities, scores, allocations):
        found += [(score, allocation, sparsity, seed) for seed in (seeds if score == "random" else [0])]
    if "magnitude" in scores:
        found += [("magnitude", "sensitivity", sparsity, 0) for sparsity in sparsities]
    return found


def study(
    csv: Path,
    wanted: Sequence[Job],
    *,
    images: int,
    calibration: int,
    directory: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> int:
    """Run what is not yet in the file; returns how many runs were made."""
    setup = _setup(images, calibration, directory)
    done = {result.key for result in rows.read(csv, Result)}
    left = [job for job in wanted if (*job, images, setup.recipe) not in done]
    scans: list[Sensitivity] = []

    def scan() -> Sensitivity:
        if not scans:
            scans.append(
                sensitivity_scan(
                    deepcopy(setup.model),
                    lambda model: (
                        sum(float(_loss(model, batch)) for batch in setup.calibration) / len(setup.calibration)
                    ),
                    SCAN,
                    cache=csv.with_suffix(".scan.json"),
                    progress=lambda done, total, what: say(f"scan {done}/{total} {what}"),
                )
            )
        return scans[0]

    for index, job in enumerate(left, 1):
        result = _run(setup, job, scan)
        rows.append(csv, result)
        say(
            f"[{index}/{len(left)}] {job[0]:<10} {job[1]:<12} {job[2]:<4g} seed {job[3]}  {result.accuracy:.2f} %, "
            f"BatchNorm recalibrated {result.recalibrated:.2f} %{'' if result.exact else '  NOT EXACT'}"
        )
    return len(left)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m resu.experiments.toolbox", description=__doc__)
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/resnet20_pruning.csv"))
    parser.add_argument("--scores", nargs="+", default=list(SCORES), metavar="SCORE", help=", ".join(SCORES))
    parser.add_argument("--allocations", nargs="+", default=list(ALLOCATIONS), metavar="NAME")
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of random scores")
    parser.add_argument("--images", type=int, default=1000, help="test images, evenly taken")
    parser.add_argument("--calibration", type=int, default=300, help="training images for statistics")
    parser.add_argument("--data-dir", help="folder of the data (default: RESU_DATA)")
    parser.add_argument("--page", type=Path, help="write tables and a plot into this page instead of running")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.page is not None:
            from resu.experiments.toolbox_page import render

            render(rows.read(options.csv, Result), options.page)
            return 0
        for name in options.scores:
            importances[name]
        for sparsity in options.sparsities:
            check_sparsity(sparsity)
        if options.calibration < 100:
            raise ValueError(f"calibration takes batches of 100 training images, got {options.calibration}")
        torch.set_num_threads(1)
        wanted = jobs(options.scores, options.allocations, options.sparsities, options.seeds)
        study(
            options.csv,
            wanted,
            images=options.images,
            calibration=options.calibration,
            directory=options.data_dir,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
    except (DataError, ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(options.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
