"""Training of a twin: data on batches of rows, physics on batches of pairs along the series, in one loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resu.experiments.spinn.closed_form import output_layer, solve_output
from resu.experiments.spinn.laws import take_pairs
from resu.experiments.spinn.recording import Prepared
from resu.experiments.spinn.twin import Twin

__all__ = ["Recipe", "fit", "physics_rms"]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        steps: Optimizer steps of the dense network.
        tune: Steps after each stage of pruning.
        rate: Highest learning rate of the dense network.
        tune_rate: Highest learning rate after each stage.
        decay: Decoupled weight decay (AdamW).
        rows: Per batch of data.
        pairs: Per batch of physics.
        penalty: Of the output layer's closed form; None: chosen on the validation part, each time.
        settle: Whether the output layer is solved at the end too, for the hidden units that training led to.
    """

    steps: int = 300
    tune: int = 100
    rate: float = 1e-3
    tune_rate: float = 5e-4
    decay: float = 0.1
    rows: int = 256
    pairs: int = 32
    penalty: float | None = None
    settle: bool = False


def fit(
    twin: Twin,
    data: Prepared,
    recipe: Recipe,
    *,
    steps: int | None = None,
    rate: float | None = None,
    rows: Tensor | None = None,
    on_optimizer: Callable[[torch.optim.Optimizer], object] | None = None,
) -> Twin:
    """Train in place: output layer in closed form, then AdamW on everything, gradients clipped to norm 1.

    Batches come from torch's global generator.

    Args:
        twin: What to train, its law's constants included.
        data: Where from.
        recipe: How.
        steps, rate: Instead of those of the dense network.
        rows: Rows to train on; None: the training part.
        on_optimizer: Called with the optimizer before the first step.

    Returns:
        ``twin``.
    """
    rows = data.train if rows is None else rows
    ends, steps = data.pairs(rows), recipe.steps if steps is None else steps
    rate = recipe.rate if rate is None else rate
    groups: list[dict[str, object]] = [{"params": twin.network.parameters()}]
    if twin.law is not None:
        # A few constants, which may move fast.
        groups.append({"params": twin.law.parameters(), "weight_decay": 0.0, "lr": 10 * rate})
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, steps))
    if on_optimizer is not None:
        on_optimizer(optimizer)
    pull = solve_output(twin, data, rows, recipe.penalty).pull
    for _ in range(steps):
        optimizer.zero_grad()
        loss = _loss(twin, data, rows[torch.randint(len(rows), (recipe.rows,))], pull)
        if twin.law is not None:
            loss = loss + _physics(twin, data, ends[torch.randint(len(ends), (recipe.pairs,))])
        loss.backward()
        nn.utils.clip_grad_norm_(twin.network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    if recipe.settle:
        solve_output(twin, data, rows, recipe.penalty)
    return twin


def _share(step: int, steps: int) -> float:
    """Of the highest learning rate: a rise over the first tenth, then half a cosine down."""
    return min(1.0, 10 * (step + 1) / max(steps, 1)) * (1 + math.cos(math.pi * step / max(steps, 1))) / 2


def _loss(twin: Twin, data: Prepared, rows: Tensor, pull: float) -> Tensor:
    error: Tensor = (twin(data.inputs[rows]) - data.targets[rows]) / twin.scale
    return error.square().mean() + pull * output_layer(twin).weight.square().sum()


def _physics(twin: Twin, data: Prepared, ends: Tensor) -> Tensor:
    assert twin.law is not None
    first, last = twin(data.inputs[ends.T.reshape(-1)]).chunk(2)
    terms = twin.law.terms(take_pairs(data, ends, first, last)).values()
    return torch.stack([term.loss for term in terms]).sum()


def physics_rms(twin: Twin, data: Prepared, rows: Tensor) -> dict[str, tuple[float, str]]:
    """Per term of the law: root mean square of the residual over all pairs in ``rows``, and its unit."""
    if twin.law is None:
        return {}
    ends = data.pairs(rows)
    with torch.no_grad():
        pairs = take_pairs(data, ends, twin(data.inputs[ends[:, 0]]), twin(data.inputs[ends[:, 1]]))
        return {name: (term.rms, term.unit) for name, term in twin.law.terms(pairs).items()}
