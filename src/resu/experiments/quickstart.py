"""The comparison behind ``resu quickstart``: one network, one cost, every way to make it sparse."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resu.core.counting import keep_count
from resu.core.layers import select
from resu.core.mask import SparseMask
from resu.experiments.data import Dataset
from resu.experiments.methods import Plan, Setting, methods
from resu.experiments.plots import Phase, Trace
from resu.experiments.recipes import train
from resu.experiments.tasks import Task, tasks

__all__ = ["DATA", "LABELS", "SWEEP", "Comparison", "Run", "Verdict", "compare", "verdicts"]

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
    trace: Trace = field(default_factory=Trace)

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
        on_run: Called with a label before each run.
    """
    task = replace(tasks[DATA[data_name][0]], steps=steps)
    runs: dict[str, list[Run]] = {name: [] for name in LABELS}
    for seed in seeds:
        for name in LABELS:
            on_run(f"{LABELS[name]}, seed {seed}")
            dense = runs["dense"][-1] if name == "prune-only" else None
            runs[name].append(one_run(task, name, sparsity, seed, data, dense))
    sweep: dict[str, dict[float, list[float]]] = {}
    some = tuple(seeds)[:sweep_seeds]
    for name in SWEEP if some else ():
        sweep[name] = {sparsity: [run.accuracy for run in runs[name]]}
        for level in (s for s in LEVELS if s != sparsity):
            sweep[name][level] = []
            for seed in some:
                on_run(f"{LABELS[name]} at {100 * level:g} %, seed {seed}")
                sweep[name][level].append(one_run(task, name, level, seed, data).accuracy)
    return Comparison(task, data, sparsity, tuple(seeds), runs, sweep)


def count_runs(sparsity: float, seeds: int, sweep_seeds: int) -> int:
    """How many networks :func:`compare` trains."""
    levels = sum(level != sparsity for level in LEVELS)
    return seeds * len(LABELS) + len(SWEEP) * levels * min(seeds, sweep_seeds)


def one_run(task: Task, name: str, sparsity: float, seed: int, data: Dataset, dense: Run | None = None) -> Run:
    """Train one network; ``"prune-only"`` prunes the dense one that is given."""
    if name == "dense":
        sparsity = 0.0
    if name == "prune-only":
        assert dense is not None
        model, masks, held, trace = *_pruned(dense.model, sparsity), dense.held, Trace()
    else:
        plan = Plan(sparsity, task.steps, "scratch")
        setting = setting_of(name, plan)
        model = task.model(data, seed)
        watch = _Watch(model, plan)
        model, tensors, held = train(task, setting, plan, model, data, seed, watch)
        masks = {key: SparseMask(mask) for key, mask in tensors.items()}
        trace = watch.trace
        trace.phases = phases_of(setting, plan)
    kept, total, exact = _count(model, masks, sparsity)
    return Run(
        method=name,
        sparsity=sparsity,
        seed=seed,
        val=100.0 * float(_correct(model, data, "val").double().mean()),
        correct=_correct(model, data, "test"),
        kept=kept,
        total=total,
        zeros_exact=exact,
        held=held,
        model=model,
        masks=masks,
        trace=trace,
    )


def setting_of(name: str, plan: Plan) -> Setting:
    """A method's setting; cycles take two thirds of the steps, and masked training the last third.

    Without it they would end on a commit, with no step left to recover from it.
    """
    if not name.startswith(("inline", "qresu")):
        return methods[name](plan)
    tail = plan.at(1 / 3)
    setting = methods[name](replace(plan, steps=plan.steps - tail))
    return replace(setting, tail=setting.tail + tail)


def _pruned(dense: nn.Module, sparsity: float) -> tuple[nn.Module, dict[str, SparseMask]]:
    """A copy of a trained network without its smallest weights over all layers."""
    import copy

    from resu.training import Sparsifier, Static

    model = copy.deepcopy(dense)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rule = Static(sparsity=sparsity, init="magnitude")
    return model, Sparsifier(model, optimizer, rule, distribution="global").commit()


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


class _Watch:
    """Follows a run from outside: the loss of every step, the sparsity of the network now and then."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan = model, plan
        self.trace = Trace()

    def __call__(self, step: int, loss: Tensor) -> None:
        self.trace.loss.append(float(loss))
        if step % 4 == 0 or step == self.plan.steps - 1:
            share = self._sparsity()
            if not self.trace.sparsity or self.trace.sparsity[-1][1] != share:
                self.trace.sparsity.append((step, share))

    def _sparsity(self) -> float:
        from resu.modules.convert import get_resu_modules

        modules = get_resu_modules(self.model).values()
        if modules:  # their masks say it, also while θ fills the pruned positions
            pruned = sum(module.mask.n_pruned for module in modules if module.mask is not None)
            return pruned / sum(module.weight_shape.numel() for module in modules)
        weights = [layer.weight.detach() for layer in select(self.model).values()]
        return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def phases_of(setting: Setting, plan: Plan) -> list[Phase]:
    """What a method does when, as its setting says."""
    if setting.driver == "cycles":
        from resu.training import RESUConfig

        found: list[Phase] = []
        config = RESUConfig.from_dict(setting.options)
        names = ("train", "stabilize", "resurrection: θ trains")
        at = 0
        for _ in range(config.cycles):
            for name, steps in zip(names, config.phase_steps(), strict=True):
                found.append(Phase(name, at, at + steps))
                at += steps
        return [*found, Phase("fixed mask", at, plan.steps)]
    if setting.driver == "sparsifier":
        options = setting.options
        begin, end = options.get("begin_step", 0), options.get("end_step", plan.steps)
        if setting.algorithm == "static":
            return [Phase("train", 0, begin), Phase("fixed mask", begin, plan.steps)]
        ramp = options.get("ramp_end_step", end)
        return [
            Phase("train", 0, begin),
            Phase("ramp", begin, ramp),
            Phase("tournaments", ramp, end),
            Phase("fixed mask", end, plan.steps),
        ]
    return [Phase("train", 0, plan.steps)]


@dataclass(frozen=True)
class Verdict:
    """A method against the best one: the difference of mean test accuracies and its standard error."""

    method: str
    difference: float
    error: float

    @property
    def is_noise(self) -> bool:
        """Whether the difference is within two standard errors."""
        return abs(self.difference) <= 2 * self.error


def verdicts(runs: Mapping[str, Sequence[Run]]) -> tuple[str, list[Verdict]]:
    """The method with the highest mean test accuracy, and every other sparse one against it.

    The standard error joins two sources: which test examples were drawn (both methods see the same ones, so
    the error is that of the mean difference per example) and which seeds (their variance, where there are
    two or more).
    """
    rights = {
        name: torch.stack([run.correct for run in some]).double() for name, some in runs.items() if name != "dense"
    }
    best = max(rights, key=lambda name: float(rights[name].mean()))
    found = []
    for name, right in rights.items():
        if name == best:
            continue
        per_example = (right - rights[best]).mean(dim=0)
        variance = float(per_example.var()) / per_example.numel()
        if len(right) > 1:
            per_seed = right.mean(dim=1) - rights[best].mean(dim=1)
            variance += float(per_seed.var()) / len(right)
        found.append(Verdict(name, 100 * float(per_example.mean()), 100 * math.sqrt(variance)))
    return best, found


KINDS = {
    "active": "active weights",
    "codes": "4-bit codes",
    "scales": "scales, offsets",
    "mask": "mask",
    "theta": "θ",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "cache": "cache",
    "other": "biases",
}
MODES = {
    "dense": ("dense", {}),
    "sparse": ("SPARSE", {}),
    "resu": ("RESU", {}),
    "qresu": ("QRESU, 4 bits", {}),
    "qresu bf16": ("QRESU, 4 bits, bf16 θ", {"theta_dtype": torch.bfloat16}),
    "qresu_selective": ("QRESU-Selective", {}),
}


def memory_by_mode(model: nn.Module, sparsity: float, data: Dataset) -> dict[str, dict[str, int]]:
    """Bytes by kind that one training step leaves held, with the network in each mode; measured.

    Adam trains what the mode trains: everything while dense or sparse, θ (and biases) otherwise.
    """
    import copy

    from resu.modules.convert import convert_to_resu, get_resu_modules, resurrection_parameters
    from resu.modules.memory import memory_report

    found = {}
    for key, (label, options) in MODES.items():
        network = convert_to_resu(copy.deepcopy(model)).train()
        mode = key.partition(" ")[0]
        for layer in get_resu_modules(network).values():
            if mode != "dense":
                layer.prune_by_magnitude(sparsity)
            if mode not in ("dense", "sparse"):
                getattr(layer, f"enter_{mode}_mode")(**options)
        trained = resurrection_parameters(network) if mode not in ("dense", "sparse") else []
        optimizer = torch.optim.Adam(trained or list(network.parameters()), lr=1e-3)
        x, y = next(iter(data.batches(0, 32, 1)))
        nn.functional.cross_entropy(network(x), y).backward()
        if mode != "qresu_selective":
            optimizer.step()
        sizes = memory_report(network, optimizer).by_kind
        found[label] = {KINDS[kind]: size for kind, size in sizes.items()}
    return found


def load_data(name: str, directory: Path | None) -> Dataset:
    """The data set of a task of the quickstart."""
    return tasks[DATA[name][0]].dataset(directory)
