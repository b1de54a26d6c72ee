"""A new tool is put in: the output layer learns from the first part of its life, or everything is trained again."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from resu.experiments.spinn.closed_form import output_layer, solve_output, solving_cost
from resu.experiments.spinn.fitting import Recipe, fit
from resu.experiments.spinn.neurons import widths
from resu.experiments.spinn.recording import Prepared
from resu.experiments.spinn.twin import Twin, dense_network

__all__ = [
    "STRENGTHS",
    "Adaptation",
    "Strength",
    "adapt",
    "compare_adaptation",
    "first_part",
    "retrain",
    "squared_errors",
]

FRACTION = 0.3


@dataclass(frozen=True, order=True)
class Strength:
    """How much a new tool may change the output layer.

    Attributes:
        weight: Times that each of its rows counts beside one of the tools that are known.
        penalty: On squared weights, in units of the mean variance of the hidden units that the layer uses.
    """

    weight: int
    penalty: float


STRENGTHS = tuple(
    Strength(weight, penalty)
    for weight in (1, 3, 10, 30, 100)
    for penalty in (10.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0, 30000.0)
)


@dataclass(frozen=True)
class Adaptation:
    """Before and after, on the part of a new tool's life that was not seen.

    Attributes:
        group: The tool or case.
        rows: Rows of its life that were learned from.
        rest: Rows of its life that it is judged by.
        before, retrained: Root mean squared error on the rest, in the unit of the target.
        adapted: The same for each strength.
        cost: Multiply-adds of adapting over those of retraining.
        seconds: Processor time of adapting over that of retraining.
    """

    group: int
    rows: int
    rest: int
    before: float
    adapted: tuple[float, ...]
    retrained: float
    cost: float
    seconds: float


def first_part(data: Prepared, group: int, fraction: float = FRACTION) -> tuple[Tensor, Tensor]:
    """Rows of the first ``fraction`` of a group's time, and the rest."""
    rows = torch.tensor(data.recording.rows([group]))
    time_ = data.time[rows]
    early = time_ <= time_.min() + fraction * (time_.max() - time_.min())
    return rows[early], rows[~early]


def adapt(twin: Twin, data: Prepared, rows: Tensor, strength: Strength) -> Twin:
    """A copy whose output layer is solved anew, on the training part and ``rows``; all before it stays.

    What the hidden units say of the training part can be kept, so a machine that meets a new tool has little to do.
    Zeros of a sparse network stay zero.

    Args:
        twin: A trained one, dense or sparse.
        data: The recording.
        rows: Rows of the new tool.
        strength: Chosen on tools that are known (:func:`squared_errors`).
    """
    twin = copy.deepcopy(twin)
    head, units = _head(twin, data)
    found, last = output_layer(_solved(head, units, rows, strength)), output_layer(twin)
    with torch.no_grad():
        last.weight[:, _used(last)] = found.weight
        last.bias.copy_(found.bias)
    return twin


def _solved(head: Twin, units: Prepared, rows: Tensor, strength: Strength) -> Twin:
    solve_output(head, units, _with(units, rows, strength.weight), strength.penalty)
    return head


def _with(data: Prepared, rows: Tensor, weight: int) -> Tensor:
    return torch.cat([data.train, rows.repeat(weight)]).sort().values


def squared_errors(twin: Twin, data: Prepared, group: int) -> dict[Strength, float]:
    """What each strength would do: the sum of squared errors on the rest of a group's life.

    For a tool that is known but that ``twin`` was trained without, so that the best strength can be told.

    Args:
        twin: Trained without the group.
        data: With the group outside the training part.
        group: The tool.
    """
    rows, rest = first_part(data, group)
    head, units = _head(twin, data)
    found = {}
    for strength in STRENGTHS:
        missed = _solved(head, units, rows, strength).predict(units.inputs[rest]) - data.targets[rest]
        found[strength] = float(missed.double().square().sum())
    return found


def _used(last: nn.Linear) -> Tensor:
    return (last.weight != 0).any(0)


@torch.no_grad()
def _head(twin: Twin, data: Prepared) -> tuple[Twin, Prepared]:
    """The output layer on the hidden units that it uses, as a twin of its own, and those units as its inputs."""
    last = output_layer(twin)
    used = _used(last)
    linear = nn.Linear(int(used.sum()), last.out_features)
    linear.weight.copy_(last.weight[:, used])
    linear.bias.copy_(last.bias)
    head = Twin(nn.Sequential(linear), data.targets[data.train], twin.law)
    return head, replace(data, inputs=twin.network[:-1](data.inputs)[:, used])


def retrain(twin: Twin, data: Prepared, rows: Tensor, recipe: Recipe, seed: int, weight: int = 1) -> Twin:
    """A dense twin trained from nothing on the training part and ``rows``, each of which counts ``weight`` times."""
    torch.manual_seed(seed)
    everything = _with(data, rows, weight)
    network = dense_network(data.inputs.shape[1], data.targets.shape[1], widths(twin.network))
    return fit(Twin(network, data.targets[everything], copy.deepcopy(twin.law)), data, recipe, rows=everything)


def training_cost(network: nn.Module, rows: int, steps: int) -> int:
    """Multiply-adds of training: forward, and twice that backward, per weight, row and step."""
    return 3 * _weights(network) * rows * steps


def adapting_cost(twin: Twin, known: int, new: int, weight: int) -> int:
    """Multiply-adds of one pass, zeros counted too, and of the normal equations, new rows listed ``weight`` times."""
    last = output_layer(twin)
    used = int(_used(last).sum())
    return _weights(twin.network) * (known + new) + (known + weight * new) * used**2 + last.out_features * used**3 // 3


def _weights(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters() if p.ndim == 2)


def compare_adaptation(
    twin: Twin,
    data: Prepared,
    group: int,
    strengths: Sequence[Strength],
    recipe: Recipe,
    *,
    seed: int = 0,
    weight: int = 1,
) -> Adaptation:
    """Adapt to one group of the test part and retrain for it; both see the first 30 % of its life.

    Args:
        twin: Trained on the training part.
        data: The recording.
        group: The new tool.
        strengths: Of adapting; the cost is that of the first.
        recipe: Of retraining.
        seed: Of retraining.
        weight: Times that each row of the new tool counts in retraining.
    """
    rows, rest = first_part(data, group)
    began = time.process_time()
    adapted = [adapt(twin, data, rows, strengths[0])]
    middle = time.process_time()
    again = retrain(twin, data, rows, recipe, seed, weight)
    ended = time.process_time()
    adapted += [adapt(twin, data, rows, strength) for strength in strengths[1:]]
    cost = adapting_cost(twin, len(data.train), len(rows), strengths[0].weight)
    full = training_cost(again.network, recipe.rows, recipe.steps)
    full += solving_cost(again.network, len(data.train) + len(rows))

    def error(model: Twin) -> float:
        return float((model.predict(data.inputs[rest]) - data.targets[rest]).square().mean().sqrt())

    return Adaptation(
        *(group, len(rows), len(rest), error(twin), tuple(map(error, adapted)), error(again)),
        *(cost / full, (middle - began) / max(ended - middle, 1e-9)),
    )
