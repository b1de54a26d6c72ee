"""A new tool is put in: the last layers learn from the first part of its life, or everything is trained again."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resu.experiments.spinn.fitting import Recipe, fit
from resu.experiments.spinn.recording import Prepared
from resu.experiments.spinn.twin import Twin, dense_network

__all__ = ["Adaptation", "adapt", "compare_adaptation", "first_part", "retrain", "training_cost"]


@dataclass(frozen=True)
class Adaptation:
    """Before and after, on the part of a new tool's life that was not seen.

    Attributes:
        group: The tool or case.
        rows: Rows of its life that were learned from.
        before, adapted, retrained: Root mean squared error on the rest, in the unit of the target.
        cost: Multiply-adds of adapting over those of retraining.
        seconds: Processor time of adapting over that of retraining.
    """

    group: int
    rows: int
    before: float
    adapted: float
    retrained: float
    cost: float
    seconds: float

    @property
    def recovered(self) -> float:
        """Share of retraining's gain; NaN where retraining gained nothing."""
        gain = self.before - self.retrained
        return (self.before - self.adapted) / gain if gain > 0 else float("nan")


def first_part(data: Prepared, group: int, fraction: float) -> tuple[Tensor, Tensor]:
    """Rows of the first ``fraction`` of a group's time, and the rest."""
    rows = torch.tensor(data.recording.rows([group]))
    time_ = data.time[rows]
    early = time_ <= time_.min() + fraction * (time_.max() - time_.min())
    return rows[early], rows[~early]


def _last(network: nn.Sequential, layers: int) -> int:
    """Index in the chain from which the last linear layers begin."""
    linear = [i for i, layer in enumerate(network) if isinstance(layer, nn.Linear)]
    return linear[-layers]


def adapt(twin: Twin, data: Prepared, rows: Tensor, *, layers: int = 2, steps: int = 60, rate: float = 1e-3) -> Twin:
    """A copy whose last layers were trained on ``rows``; what comes before them is computed once.

    Zeros of a sparse network stay zero. A pull back to the weights of before (L2) keeps what the other tools taught.

    Args:
        twin: A trained one, dense or sparse.
        data: The recording.
        rows: Rows of the new tool.
        layers: Linear layers that train, counted from the end.
        steps: Optimizer steps, all rows each.
        rate: Learning rate.
    """
    twin = copy.deepcopy(twin)
    at = _last(twin.network, layers)
    head = twin.network[at:]
    with torch.no_grad():
        features = twin.network[:at](data.inputs[rows])
    start = [p.detach().clone() for p in head.parameters()]
    alive = [p != 0 if p.ndim == 2 else torch.ones_like(p, dtype=torch.bool) for p in start]
    optimizer = torch.optim.Adam(head.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        error = ((twin.mean + twin.scale * head(features) - data.targets[rows]) / twin.scale).square().mean()
        pull = sum(((p - s).square().sum() for p, s in zip(head.parameters(), start, strict=True)), torch.zeros(()))
        (error + 1e-3 * pull).backward()
        optimizer.step()
        with torch.no_grad():
            for p, mask in zip(head.parameters(), alive, strict=True):
                p.masked_fill_(~mask, 0.0)
    return twin


def retrain(twin: Twin, data: Prepared, rows: Tensor, recipe: Recipe, seed: int) -> Twin:
    """A dense twin trained from nothing on the training part and ``rows``."""
    torch.manual_seed(seed)
    everything = torch.cat([data.train, rows]).sort().values
    network = dense_network(data.inputs.shape[1], data.targets.shape[1], _hidden(twin))
    return fit(Twin(network, data.targets[everything], copy.deepcopy(twin.law)), data, recipe, rows=everything)


def _hidden(twin: Twin) -> list[int]:
    return [layer.out_features for layer in twin.network if isinstance(layer, nn.Linear)][:-1]


def training_cost(network: nn.Module, rows: int, steps: int) -> int:
    """Multiply-adds of training: forward, and twice that backward, per weight, row and step."""
    weights = sum(p.numel() for p in network.parameters() if p.ndim == 2)
    return 3 * weights * rows * steps


def compare_adaptation(
    twin: Twin, data: Prepared, group: int, recipe: Recipe, *, fraction: float = 0.3, seed: int = 0, steps: int = 60
) -> Adaptation:
    """Adapt to one group of the test part and retrain for it; both see the first ``fraction`` of its life.

    Args:
        twin: Trained on the training part.
        data: The recording.
        group: The new tool.
        recipe: Of retraining.
        fraction: Of its time.
        seed: Of retraining.
        steps: Of adapting.
    """
    rows, rest = first_part(data, group, fraction)
    began = time.process_time()
    adapted = adapt(twin, data, rows, steps=steps)
    middle = time.process_time()
    again = retrain(twin, data, rows, recipe, seed)
    ended = time.process_time()
    at = _last(twin.network, 2)
    cost = training_cost(twin.network[at:], len(rows), steps) + training_cost(twin.network[:at], len(rows), 1) // 3
    full = training_cost(again.network, recipe.rows, recipe.steps)

    def error(model: Twin) -> float:
        return float((model.predict(data.inputs[rest]) - data.targets[rest]).square().mean().sqrt())

    return Adaptation(
        group,
        len(rows),
        error(twin),
        error(adapted),
        error(again),
        cost / full,
        (middle - began) / max(ended - middle, 1e-9),
    )
