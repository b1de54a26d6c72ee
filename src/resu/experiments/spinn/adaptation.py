"""A new tool is put in: the output layer learns from the first part of its life, or everything is trained again."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from resu.experiments.spinn.closed_form import normal_cost, output_layer, output_solutions, solving_cost
from resu.experiments.spinn.fitting import Recipe, fit
from resu.experiments.spinn.mixing import mixture
from resu.experiments.spinn.neurons import widths
from resu.experiments.spinn.recording import Prepared, Recording
from resu.experiments.spinn.twin import Twin, dense_network

__all__ = [
    "CANDIDATES",
    "PENALTIES",
    "RETRAIN_WEIGHT",
    "WEIGHT",
    "Adaptation",
    "adapt",
    "compare_adaptation",
    "error_products",
    "first_part",
    "learn_shares",
    "retrain",
]

FRACTION = 0.3
#: Times that a row of a new tool counts beside one of the tools that are known.
WEIGHT = 100
#: The same in retraining: of 1, 3, 10 and 30 the best for it, on the tools and cases outside the test part.
RETRAIN_WEIGHT = 10
#: On squared weights, in units of the mean variance of the hidden units that the layer uses: from a layer that follows
#: the new tool closely to one that hardly does.
PENALTIES = (1.0, 10.0, 100.0, 1000.0, 10000.0, 100000.0)
#: The layer as it is, and that of each penalty.
CANDIDATES = 1 + len(PENALTIES)


@dataclass(frozen=True)
class Adaptation:
    """Before and after, on the part of a new tool's life that was not seen.

    Attributes:
        rest: Rows of its life that it is judged by.
        before, retrained: Root mean squared error on the rest, in the unit of the target.
        adapted: The same for each mixture.
        cost: Multiply-adds of adapting over those of retraining.
        time: Processor time of adapting over that of retraining.
    """

    rest: int
    before: float
    adapted: tuple[float, ...]
    retrained: float
    cost: float
    time: float


def first_part(data: Prepared, group: int, fraction: float = FRACTION) -> tuple[Tensor, Tensor]:
    """Rows of the first ``fraction`` of a group's time, and the rest.

    Of a group with one moment there is no rest.

    Raises:
        ValueError: If there is no such group.
    """
    recording = data.recording
    rows = torch.tensor(recording.rows([group]))
    if not len(rows):
        raise ValueError(f"there is no {recording.group_name} {group}; there are {recording.groups()}")
    time_ = data.time[rows]
    early = time_ <= time_.min() + fraction * (time_.max() - time_.min())
    return rows[early], rows[~early]


def adapt(twin: Twin, data: Prepared, rows: Tensor, shares: Sequence[float] | Tensor | None = None) -> Twin:
    """A copy whose output layer is a mixture: of the layer as it is, and of layers solved anew with the new rows.

    Each of these is solved in closed form on the training part and on ``rows``, which count :data:`WEIGHT` times, with
    one of :data:`PENALTIES`. All before that layer stays, and zeros of a sparse network stay zero. What the hidden
    units say of the training part can be kept, so a machine that meets a new tool has little to do.

    Args:
        twin: A trained one, dense or sparse.
        data: The recording.
        rows: Rows of the new tool.
        shares: ``[CANDIDATES]``, which sum to 1, as :func:`learn_shares` finds them; None: all alike.

    Raises:
        ValueError: If there are more or fewer shares, or they do not sum to 1.
    """
    mixed = torch.full((CANDIDATES,), 1 / CANDIDATES) if shares is None else torch.as_tensor(shares)
    if mixed.shape != (CANDIDATES,) or not abs(float(mixed.sum()) - 1) <= 1e-6:  # nor NaN
        raise ValueError(
            f"shares must be {CANDIDATES} numbers that sum to 1 (the layer as it is, then penalties {PENALTIES}), got "
            f"{shares}"
        )
    twin = copy.deepcopy(twin)
    weights, biases = _candidates(*_head(twin, data), rows)
    last = output_layer(twin)
    with torch.no_grad():
        last.weight[:, _used(last)] = torch.tensordot(mixed.double(), weights, 1).to(last.weight)
        last.bias.copy_(mixed.double() @ biases)
    return twin


def _candidates(head: Twin, units: Prepared, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Weights ``[CANDIDATES, outputs, units]`` and biases of every candidate, float64."""
    last = output_layer(head)
    solved, _ = output_solutions(head, units, _with(units, rows, WEIGHT), PENALTIES)
    weights, biases = zip((last.weight.detach().double(), last.bias.detach().double()), *solved, strict=True)
    return torch.stack(weights), torch.stack(biases)


def _with(data: Prepared, rows: Tensor, weight: int) -> Tensor:
    return torch.cat([data.train, rows.repeat(weight)]).sort().values


def error_products(twin: Twin, data: Prepared, group: int) -> Tensor:
    """``Σ eᵢ eⱼ`` over the rest of a group's life and over channels, for the errors of candidates i, j: float64.

    For a tool that is known but that ``twin`` was trained without, so that shares can be told (:func:`mixture`).
    Channels count in units of their variance over the training part.

    Args:
        twin: Trained without the group.
        data: With the group outside the training part.
        group: The tool.
    """
    rows, rest = first_part(data, group)
    head, units = _head(twin, data)
    weights, biases = _candidates(head, units, rows)
    wanted = ((data.targets[rest] - twin.mean) / twin.scale).double()
    missed = torch.einsum("ru,cou->cro", units.inputs[rest].double(), weights) + biases[:, None] - wanted
    flat = missed.flatten(1)
    return flat @ flat.T


def learn_shares(
    recording: Recording,
    make: Callable[[Prepared], Twin],
    groups: Iterable[int] | None = None,
    *,
    progress: Callable[[int, int, str], object] | None = None,
) -> Tensor:
    """Shares for :func:`adapt`, from tools whose whole life is known: each in turn is new to a twin without it.

    No twin is trained on groups of the test part.

    Args:
        recording: With the tools that are known in its training and validation parts.
        make: Trains a twin for a split; called once per group.
        groups: Those that are left out in turn; None: all that are known. One without a first part or a rest is
            skipped.
        progress: ``progress(done, total, what)``, at the end too.

    Returns:
        Float64 ``[CANDIDATES]``.

    Raises:
        ValueError: If no group is left.
    """
    train, val, _ = recording.parts
    chosen = [*train, *val] if groups is None else list(groups)
    found = []
    for done, group in enumerate(chosen):
        if progress is not None:
            progress(done, len(chosen), f"without {recording.group_name} {group}")
        left = [tuple(g for g in part if g != group) for part in (train, val)]
        data = recording.prepare((left[0], left[1], (group,)))
        if all(len(part) for part in first_part(data, group)):
            found.append(error_products(make(data), data, group))
    if progress is not None:
        progress(len(chosen), len(chosen), "shares")
    return mixture(found)


def _used(last: nn.Linear) -> Tensor:
    """Units with a weight that is not 0; where pruning left none, the first, whose weights stay 0."""
    used = (last.weight != 0).any(0)
    used[0] |= not used.any()
    return used


@torch.no_grad()
def _head(twin: Twin, data: Prepared) -> tuple[Twin, Prepared]:
    """The output layer on the hidden units that it uses, as a twin of its own, and those units as its inputs."""
    last = output_layer(twin)
    used = _used(last)
    # Without start values: nobody's random numbers change when a twin is adapted.
    linear = nn.utils.skip_init(nn.Linear, int(used.sum()), last.out_features)
    linear.weight.copy_(last.weight[:, used])
    linear.bias.copy_(last.bias)
    head = Twin(nn.Sequential(linear), data.targets[data.train], twin.law)
    head.mean.copy_(twin.mean)  # which need not be those of this training part
    head.scale.copy_(twin.scale)
    return head, replace(data, inputs=twin.network[:-1](data.inputs)[:, used])


def retrain(twin: Twin, data: Prepared, rows: Tensor, recipe: Recipe, seed: int, weight: int = RETRAIN_WEIGHT) -> Twin:
    """A dense twin trained from nothing on the training part and ``rows``, each of which counts ``weight`` times."""
    torch.manual_seed(seed)
    everything = _with(data, rows, weight)
    network = dense_network(data.inputs.shape[1], data.targets.shape[1], widths(twin.network))
    return fit(Twin(network, data.targets[everything], copy.deepcopy(twin.law)), data, recipe, rows=everything)


def training_cost(network: nn.Module, rows: int, steps: int) -> int:
    """Multiply-adds of training: forward, and twice that backward, per weight, row and step."""
    return 3 * _weights(network) * rows * steps


def adapting_cost(twin: Twin, known: int, new: int) -> int:
    """Multiply-adds of one pass, zeros counted too, of the normal equations, and of solving them for each penalty."""
    last = output_layer(twin)
    used = int(_used(last).sum())
    passing = _weights(twin.network) * (known + new) + normal_cost(twin, known + new, used)
    return passing + len(PENALTIES) * last.out_features * used**3 // 3


def _weights(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters() if p.ndim == 2)


def compare_adaptation(
    twin: Twin,
    data: Prepared,
    group: int,
    shares: Sequence[Tensor | None],
    recipe: Recipe,
    *,
    seed: int = 0,
    weight: int = RETRAIN_WEIGHT,
) -> Adaptation:
    """Adapt to one group of the test part and retrain for it; both see the first 30 % of its life.

    Args:
        twin: Trained on the training part.
        data: The recording.
        group: The new tool.
        shares: Of each mixture.
        recipe: Of retraining.
        seed: Of retraining.
        weight: Times that each row of the new tool counts in retraining.

    Raises:
        ValueError: If the group has no first part or no rest.
    """
    rows, rest = first_part(data, group)
    if not len(rows) or not len(rest):
        raise ValueError(
            f"{data.recording.group_name} {group} has {len(rows)} rows to learn from and {len(rest)} to be judged by; "
            "it needs some of both"
        )
    began = time.process_time()
    adapted = [adapt(twin, data, rows, shares[0])]
    middle = time.process_time()
    again = retrain(twin, data, rows, recipe, seed, weight)
    ended = time.process_time()
    adapted += [adapt(twin, data, rows, mixed) for mixed in shares[1:]]
    full = training_cost(again.network, recipe.rows, recipe.steps)
    full += (1 + recipe.settle) * solving_cost(again, len(data.train) + len(rows))

    def error(model: Twin) -> float:
        return float((model.predict(data.inputs[rest]) - data.targets[rest]).square().mean().sqrt())

    return Adaptation(
        *(len(rest), error(twin), tuple(map(error, adapted)), error(again)),
        *(adapting_cost(twin, len(data.train), len(rows)) / full, (middle - began) / max(ended - middle, 1e-9)),
    )
