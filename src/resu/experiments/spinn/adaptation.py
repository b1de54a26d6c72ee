"""A new tool is put in: the output layer learns from the first part of its life, or everything is trained again."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resu.experiments.spinn.fitting import PENALTIES, Recipe, fit, solve_output
from resu.experiments.spinn.recording import Prepared
from resu.experiments.spinn.twin import Twin, dense_network

__all__ = ["Adaptation", "adapt", "compare_adaptation", "first_part", "retrain", "solving_cost", "training_cost"]


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


def adapt(twin: Twin, data: Prepared, rows: Tensor) -> Twin:
    """A copy whose output layer is solved anew, on the training part and ``rows``; all before it stays.

    What the hidden units say of the training part can be kept, so a machine that meets a new tool has little to do.
    Zeros of a sparse network stay zero.

    Args:
        twin: A trained one, dense or sparse.
        data: The recording.
        rows: Rows of the new tool.
    """
    twin = copy.deepcopy(twin)
    solve_output(twin, data, torch.cat([data.train, rows]))
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
    return 3 * _weights(network) * rows * steps


def solving_cost(network: nn.Sequential, rows: int) -> int:
    """Multiply-adds of one pass over ``rows``, and of the output layer's normal equations for each penalty."""
    last = network[-1]
    assert isinstance(last, nn.Linear)
    width = last.in_features
    return _weights(network) * rows + len(PENALTIES) * last.out_features * (rows * width**2 + width**3 // 3)


def _weights(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters() if p.ndim == 2)


def compare_adaptation(
    twin: Twin, data: Prepared, group: int, recipe: Recipe, *, fraction: float = 0.3, seed: int = 0
) -> Adaptation:
    """Adapt to one group of the test part and retrain for it; both see the first ``fraction`` of its life.

    Args:
        twin: Trained on the training part.
        data: The recording.
        group: The new tool.
        recipe: Of retraining.
        fraction: Of its time.
        seed: Of retraining.
    """
    rows, rest = first_part(data, group, fraction)
    began = time.process_time()
    adapted = adapt(twin, data, rows)
    middle = time.process_time()
    again = retrain(twin, data, rows, recipe, seed)
    ended = time.process_time()
    seen = len(data.train) + len(rows)
    cost = solving_cost(twin.network, seen)
    full = training_cost(again.network, recipe.rows, recipe.steps) + solving_cost(again.network, seen)

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
