"""One run: a task, a method, a sparsity, a seed. Steps, batches and learning rates are the same for all."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from resu.core.counting import keep_count
from resu.core.layers import select
from resu.experiments.cycles import run_cycles
from resu.experiments.data import Batch, Dataset
from resu.experiments.memory import held_bytes
from resu.experiments.methods import Plan, Setting, methods
from resu.experiments.tasks import Regime, Task, evaluate, loss_of, tasks

__all__ = ["Row", "dense_start", "run", "train"]

# Fine-tuning must not see the batches of training again in the same order.
_FINETUNE_SEED = 10_000

OnStep = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Row:
    """One result; the fields are the columns of the tables.

    Attributes:
        val: The metric on held-out data (what settings are chosen by); ``test`` is what is reported.
        actual_sparsity: Counted over the pruned layers.
        zeros_exact: Whether the count of kept weights is the exact integer and all others are exactly 0.
        held_bytes: Most bytes of parameters, gradients, optimizer state, masks and θ at any sampled step.
    """

    task: str
    regime: str
    method: str
    sparsity: float
    seed: int
    steps: int
    metric: str
    val: float
    test: float
    actual_sparsity: float
    zeros_exact: bool
    held_bytes: int
    seconds: float
    settings: str
    recipe: str
    torch: str

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows the same experiment."""
        parts = (self.task, self.regime, self.method, f"{self.sparsity:g}", self.seed, self.steps)
        return (*map(str, parts), self.settings, self.recipe)


def plan_key(task: Task, method: str, sparsity: float, seed: int, regime: Regime) -> tuple[str, ...]:
    """The key of the row that :func:`run` would give."""
    plan = Plan(sparsity, task.steps_of(regime), regime)
    setting = str(methods[method](plan))
    parts = (task.name, regime, method, f"{sparsity:g}", seed, plan.steps)
    return (*map(str, parts), setting, task.describe(regime))


def run(
    task: str | Task,
    method: str,
    sparsity: float,
    seed: int,
    regime: Regime = "scratch",
    *,
    data: Dataset | None = None,
    directory: str | Path | None = None,
    cache: Path | None = None,
    on_step: OnStep | None = None,
) -> Row:
    """Train once and measure.

    Args:
        task: A task or its name.
        method: A registered method; ``"dense"`` ignores the sparsity.
        sparsity: Fraction of the pruned layers' weights removed in the end, in [0, 1).
        seed: Of start values, batches and random masks.
        regime: ``"scratch"``, or ``"finetune"``: a trained dense network, the same for every method, is
            pruned and trained further with a fraction of its steps.
        data: The data set, if it is loaded already; else it is read from ``directory``.
        directory: See :func:`resu.experiments.data.load`.
        cache: Folder that keeps trained dense networks.
        on_step: Called after each step with its number and loss.

    Returns:
        The row; all of it but ``seconds`` follows from the arguments alone with one thread.
    """
    task = tasks[task] if isinstance(task, str) else task
    if regime not in ("scratch", "finetune"):
        raise ValueError(f"regime must be 'scratch' or 'finetune', got {regime!r}")
    if method == "dense":
        sparsity = 0.0
    data = task.dataset(directory) if data is None else data
    plan = Plan(sparsity, task.steps_of(regime), regime)
    setting = methods[method](plan)
    model = task.model(data, seed)
    if regime == "finetune":
        model.load_state_dict(dense_start(task, seed, data, cache))
    start = time.perf_counter()
    model, masks, held = train(task, setting, plan, model, data, seed, on_step)
    seconds = time.perf_counter() - start
    actual, exact = _check(task, model, masks, sparsity)
    return Row(
        task=task.name,
        regime=regime,
        method=method,
        sparsity=sparsity,
        seed=seed,
        steps=plan.steps,
        metric=task.metric,
        val=round(evaluate(model, data, "val", task.metric), 5),
        test=round(evaluate(model, data, "test", task.metric), 5),
        actual_sparsity=round(actual, 8),
        zeros_exact=exact,
        held_bytes=held,
        seconds=round(seconds, 2),
        settings=str(setting),
        recipe=task.describe(regime),
        torch=torch.__version__,
    )


def train(
    task: Task,
    setting: Setting,
    plan: Plan,
    model: nn.Module,
    data: Dataset,
    seed: int,
    on_step: OnStep | None = None,
) -> tuple[nn.Module, Mapping[str, Tensor], int]:
    """Train ``model`` as a setting says.

    Returns:
        The model (cycles may replace its layers), the masks by parameter name, and the bytes held.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=task.lr, fused=True)
    batch_seed = seed + (_FINETUNE_SEED if plan.regime == "finetune" else 0)
    batches = data.batches(batch_seed, task.batch_size, plan.steps)
    model.train()
    if setting.driver == "cycles":
        masks, held = run_cycles(task, setting, plan, model, optimizer, batches, seed, on_step)
        first = plan.steps - setting.tail  # the layers keep their masks through what is left
        plain = plain_steps(task, plan, model, optimizer, batches, first=first, on_step=on_step)
        return model, masks, max(held, plain)
    sparsifier = None
    if setting.driver == "sparsifier":
        from resu.training import Sparsifier
        from resu.training.algorithms import algorithms

        rule = algorithms[setting.algorithm](**setting.options)
        sparsifier = Sparsifier(
            model,
            optimizer,
            rule,
            pattern=setting.pattern,
            distribution=setting.distribution,
            include=task.include,
            seed=seed,
        )
    held = plain_steps(task, plan, model, optimizer, batches, on_step=on_step, sparsifier=sparsifier)
    masks = {} if sparsifier is None else {k: mask.mask for k, mask in sparsifier.commit().items()}
    return model, masks, held


def plain_steps(
    task: Task,
    plan: Plan,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    *,
    first: int = 0,
    on_step: OnStep | None = None,
    sparsifier: object = None,
) -> int:
    """The ordinary loop from step ``first`` to the end of the plan; returns the bytes held."""
    held = 0
    sampled = {plan.steps // 4, plan.steps // 2, plan.steps - 1}
    for step in range(first, plan.steps):
        x, y = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = task.learning_rate(plan.regime, step)
        loss = loss_of(model, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in sampled:
            held = max(held, held_bytes(model, optimizer, sparsifier))
        if on_step is not None:
            on_step(step, loss.detach())
    return held


def _check(task: Task, model: nn.Module, masks: Mapping[str, Tensor], sparsity: float) -> tuple[float, bool]:
    """Sparsity counted from the masks, and whether counts and zeros are exact."""
    weights = {name: layer.weight.detach() for name, layer in select(model, task.include).items()}
    if not masks:
        return 0.0, sparsity == 0.0
    total = sum(weight.numel() for weight in weights.values())
    kept = sum(int(masks[name].sum()) for name in weights if name in masks)
    zeros = all(not bool(weights[name][masks[name].logical_not()].any()) for name in weights if name in masks)
    exact = zeros and set(masks) == set(weights) and kept == keep_count(total, sparsity)
    return 1.0 - kept / total, exact


_trained: dict[str, dict[str, Tensor]] = {}


def dense_start(task: Task, seed: int, data: Dataset, cache: Path | None = None) -> dict[str, Tensor]:
    """The trained dense network of a seed: from this process, from ``cache``, or trained now."""
    described = f"{task.name} {data.name} {task.steps} {task.describe('scratch')}"
    name = f"{task.name}_{hashlib.sha256(described.encode()).hexdigest()[:8]}_{seed}"
    if name in _trained:
        return _trained[name]
    file = None if cache is None else cache / f"{name}.safetensors"
    if file is not None and file.is_file():
        from safetensors.torch import load_file

        state = load_file(file)
    else:
        plan = Plan(0.0, task.steps, "scratch")
        model, _, _ = train(task, Setting("dense"), plan, task.model(data, seed), data, seed)
        state = {key: value.detach().clone() for key, value in model.state_dict().items()}
        if file is not None:
            from safetensors.torch import save_file

            file.parent.mkdir(parents=True, exist_ok=True)
            scratch = file.with_suffix(f".{os.getpid()}.part")
            save_file(state, scratch)
            os.replace(scratch, file)
    _trained[name] = state
    return state


COLUMNS = tuple(f.name for f in fields(Row))
