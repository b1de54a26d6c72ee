"""The comparison behind ``resu quickstart``: one network, one cost, every way to make it sparse."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resu.core.counting import keep_count
from resu.core.layers import select
from resu.core.mask import SparseMask
from resu.experiments.data import Dataset
from resu.experiments.methods import Plan, Setting, methods
from resu.experiments.plots import Trace
from resu.experiments.recipes import train
from resu.experiments.tasks import Task, tasks
from resu.experiments.watch import Watch, phases_of
from resu.experiments.workers import spread

__all__ = ["DATA", "LABELS", "SWEEP", "Comparison", "Run", "compare", "count_runs", "load_data"]

# name in the registry of methods (but for the first two) -> what tables call it
LABELS = {
    "dense": "dense",
    "prune-only": "one-shot, no fine-tuning",
    "one-shot": "one-shot + fine-tuning",
    "gradual": "gradual magnitude",
    "inline": "RESU inline cycles",
    "resu": "RESU dormant",
    "qresu": "QRESU cycles, 4 bits",
    "qresu-selective": "QRESU-Selective cycles, 4 bits",
}
SWEEP = ("one-shot", "gradual", "resu", "qresu")
LEVELS = (0.5, 0.8, 0.9, 0.95)

# data set -> task and steps; a run of digits takes well under a second.
DATA = {"digits": ("digits", 400), "fashion-mnist": ("mlp", 1000)}


@dataclass
class Run:
    """One network, trained and measured.

    Attributes:
        method: Key of :data:`LABELS`.
        val: Accuracy in percent on held-out training data; what the saved model is chosen by.
        correct: Which test examples are right.
        kept: Active weights of the pruned layers; ``total`` counts all of theirs.
        zeros_exact: Whether ``kept`` is the exact integer and every pruned weight is exactly +0.0.
        held: Most bytes held at any sampled step.
        trace: Loss, sparsity and phases over the steps.
    """

    method: str
    sparsity: float
    seed: int
    val: float
    correct: Tensor
    kept: int
    total: int
    zeros_exact: bool
    held: int
    model: nn.Module
    masks: dict[str, SparseMask]
    trace: Trace

    @property
    def accuracy(self) -> float:
        """Test accuracy in percent."""
        return 100.0 * float(self.correct.double().mean())

    @property
    def actual(self) -> float:
        """Sparsity counted over the pruned layers."""
        return 1.0 - self.kept / self.total


@dataclass
class Comparison:
    """All runs at one sparsity and those of the sweep, with what they have in common."""

    task: Task
    data: Dataset
    sparsity: float
    seeds: tuple[int, ...]
    runs: dict[str, list[Run]]
    sweep: dict[str, dict[float, list[float]]]

    @property
    def best(self) -> Run:
        """The run to save: best method on held-out data (mean over seeds), and its best seed there."""
        sparse = {name: runs for name, runs in self.runs.items() if name != "dense"}
        method = max(sparse, key=lambda name: sum(run.val for run in sparse[name]))
        return max(sparse[method], key=lambda run: run.val)


def compare(
    data_name: str,
    data: Dataset,
    sparsity: float,
    seeds: Sequence[int],
    steps: int,
    *,
    sweep_seeds: int = 1,
    workers: int = 1,
    on_run: Callable[[str], None] = lambda label: None,
) -> Comparison:
    """Train every method with every seed, all with the same steps, batches and learning rates.

    Args:
        data_name: Key of :data:`DATA`.
        data: The loaded data set.
        sparsity: Fraction of the weights removed in the end.
        seeds: One run per method and seed.
        steps: Optimizer steps of every run, dense training and fine-tuning together.
        sweep_seeds: How many of the seeds the sweep over sparsities uses; 0 leaves it out.
        workers: Processes; the results do not depend on it.
        on_run: Called with a label after each run.
    """
    levels = [level for level in LEVELS if level != sparsity]
    jobs = [(name, sparsity, seed) for seed in seeds for name in LABELS if name != "prune-only"]
    jobs += [(name, level, seed) for seed in tuple(seeds)[:sweep_seeds] for level in levels for name in SWEEP]
    trained = spread(
        one_run,
        (data_name, steps, data),
        jobs,
        workers,
        lambda job: on_run(f"{LABELS[job[0]]} at {100 * job[1]:g} %, seed {job[2]}"),
    )
    found = dict(zip(jobs, trained, strict=True))
    runs = {name: [found[name, sparsity, seed] for seed in seeds] if name != "prune-only" else [] for name in LABELS}
    runs["prune-only"] = [pruned_only(run, sparsity, data) for run in runs["dense"]]
    sweep: dict[str, dict[float, list[float]]] = {}
    if sweep_seeds:
        sweep = {name: {sparsity: [run.accuracy for run in runs[name]]} for name in SWEEP}
        for (name, level, _), run in found.items():
            if level != sparsity:
                sweep[name].setdefault(level, []).append(run.accuracy)
    return Comparison(task_of(data_name, steps), data, sparsity, tuple(seeds), runs, sweep)


def count_runs(sparsity: float, seeds: int, sweep_seeds: int) -> int:
    """How many networks :func:`compare` trains."""
    levels = sum(level != sparsity for level in LEVELS)
    return seeds * (len(LABELS) - 1) + len(SWEEP) * levels * min(seeds, sweep_seeds)


def task_of(data_name: str, steps: int) -> Task:
    """The task of a data set, with that many steps."""
    return replace(tasks[DATA[data_name][0]], steps=steps)


def one_run(shared: tuple[str, int, Dataset], name: str, sparsity: float, seed: int) -> Run:
    """Train one network and give it back as a plain one."""
    data_name, steps, data = shared
    task = task_of(data_name, steps)
    plan = Plan(0.0 if name == "dense" else sparsity, steps, "scratch")
    setting = setting_of(name, plan)
    model = task.model(data, seed)
    watch = Watch(model, plan)
    model, tensors, held = train(task, setting, plan, model, data, seed, watch)
    plain = task.model(data, seed)
    trained = dict(model.named_parameters())
    plain.load_state_dict({key: trained[key].detach() for key, _ in plain.named_parameters()})
    watch.trace.phases = phases_of(setting, plan)
    masks = {key: SparseMask(mask) for key, mask in tensors.items()}
    return _measured(name, plan.sparsity, seed, data, plain, masks, held, watch.trace)


def pruned_only(dense: Run, sparsity: float, data: Dataset) -> Run:
    """The trained network without its smallest weights over all layers, and no step after it."""
    from resu.training import Sparsifier, Static

    model = copy.deepcopy(dense.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rule = Static(sparsity=sparsity, init="magnitude")
    masks = Sparsifier(model, optimizer, rule, distribution="global").commit()
    return _measured("prune-only", sparsity, dense.seed, data, model, masks, dense.held, Trace())


def _measured(
    name: str,
    sparsity: float,
    seed: int,
    data: Dataset,
    model: nn.Module,
    masks: dict[str, SparseMask],
    held: int,
    trace: Trace,
) -> Run:
    kept, total, exact = _count(model, masks, sparsity)
    val = 100.0 * float(_correct(model, data, "val").double().mean())
    right = _correct(model, data, "test")
    return Run(name, sparsity, seed, val, right, kept, total, exact, held, model, masks, trace)


def setting_of(name: str, plan: Plan) -> Setting:
    """A method's setting; cycles take two thirds of the steps, and masked training the last third.

    Without it they would end on a commit, with no step left to recover from it.
    """
    if not name.startswith(("inline", "qresu")):
        return methods[name](plan)
    tail = plan.at(1 / 3)
    setting = methods[name](replace(plan, steps=plan.steps - tail))
    return replace(setting, tail=setting.tail + tail)


def _count(model: nn.Module, masks: Mapping[str, SparseMask], sparsity: float) -> tuple[int, int, bool]:
    """``(kept, total, exact)`` over the pruned layers, from the masks and the weights under them."""
    weights = {name: layer.weight.detach() for name, layer in select(model).items()}
    total = sum(weight.numel() for weight in weights.values())
    if not masks:
        return total, total, sparsity == 0.0
    kept = sum(mask.n_active for mask in masks.values())
    exact = set(masks) == set(weights) and kept == keep_count(total, sparsity)
    for name, mask in masks.items():
        pruned = mask.get_pruned(weights[name])
        exact = exact and not bool(pruned.any() | pruned.signbit().any())
    return kept, total, exact


@torch.no_grad()
def _correct(model: nn.Module, data: Dataset, part: Any) -> Tensor:
    model.eval()
    return torch.cat([model(x).argmax(1) == y for x, y in data.evaluation(part)])


def load_data(name: str, directory: Path | None) -> Dataset:
    """The data set of a task of the quickstart."""
    return tasks[DATA[name][0]].dataset(directory)
