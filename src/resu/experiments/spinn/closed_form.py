"""The output layer in closed form: it is linear, so its best weights for given hidden units are a ridge solution.

Training starts from there (variable projection: Golub and Pereyra 1973), and every stage of pruning too. A law that is
linear in the prediction, such as lumped heat, adds rows of its own to the normal equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resu.experiments.spinn.laws import LumpedHeat, take_pairs
from resu.experiments.spinn.recording import Prepared
from resu.experiments.spinn.twin import Twin

__all__ = [
    "PENALTIES",
    "Solved",
    "normal_cost",
    "output_layer",
    "output_solutions",
    "solve_output",
    "solving_cost",
]

PENALTIES = (1.0, 10.0, 100.0, 1000.0, 3000.0, 10000.0, 30000.0)


@dataclass(frozen=True)
class Solved:
    """How the output layer was solved.

    Attributes:
        penalty: On squared weights, in units of the hidden units' mean variance.
        pull: The same for a loss in means over rows and channels: with it the solution is stationary in that loss.
    """

    penalty: float
    pull: float


def output_layer(twin: Twin) -> nn.Linear:
    """The last layer of a twin's network."""
    last = twin.network[-1]
    assert isinstance(last, nn.Linear)
    return last


@torch.no_grad()
def solve_output(twin: Twin, data: Prepared, rows: Tensor, penalty: float | None = None) -> Solved:
    """Set the output layer to the ridge solution on its hidden units, weights that are exactly 0 left at 0.

    With a law of lumped heat it is the solution of data and law together, weighted as in the loss, for the law's
    constants as they are.

    Args:
        twin: Changed in place.
        data: The recording.
        rows: Rows that are fitted.
        penalty: In units of the hidden units' mean variance; None: of :data:`PENALTIES` the one that is best on the
            validation part.
    """
    last, tried = output_layer(twin), _tried(penalty, data)
    solutions, unit = output_solutions(twin, data, rows, tried)
    hidden, wanted = _units(twin, data.inputs[data.val]), _wanted(twin, data.targets[data.val])
    errors = [float((hidden @ w.T + b - wanted).square().sum()) for w, b in solutions]
    best = errors.index(min(errors))
    for parameter, value in zip((last.weight, last.bias), solutions[best], strict=True):
        parameter.copy_(value)
    return Solved(tried[best], tried[best] * unit / (len(rows) * len(last.weight)))


@torch.no_grad()
def output_solutions(
    twin: Twin, data: Prepared, rows: Tensor, penalties: Sequence[float]
) -> tuple[list[tuple[Tensor, Tensor]], float]:
    """``(weight, bias)`` of the output layer in float64 for each penalty, and the unit of penalties.

    Args:
        twin: It stays as it is; weights of its output layer that are exactly 0 are 0 in every solution.
        data: The recording.
        rows: Rows that are fitted; a row that is listed twice counts twice.
        penalties: In units of the hidden units' mean variance, which is returned.
    """
    last = output_layer(twin)
    hidden, wanted = _units(twin, data.inputs), _wanted(twin, data.targets)
    # Units that do not vary (tanh at its end) have nothing to say: the least penalty there is keeps them solvable.
    unit, middle = max(float(hidden[rows].var(0).mean()), 1e-12), hidden[rows].mean(0)
    # The bias is one more column, which costs nothing; units about their mean keep it apart from the rest.
    columns = torch.cat([hidden - middle, torch.ones_like(hidden[:, :1])], 1)
    normal = _normal_equations(twin, data, columns, wanted, rows)
    free = torch.cat([last.weight != 0, torch.ones_like(last.bias, dtype=torch.bool)[:, None]], 1)
    found = []
    for penalty in penalties:
        solution = torch.zeros_like(free, dtype=torch.float64)
        for c, (gram, right) in enumerate(normal):
            here = free[c].nonzero()[:, 0]
            ridge = torch.full((len(here),), penalty * unit, dtype=torch.float64)
            ridge[-1] = 0.0
            solution[c, here] = torch.linalg.solve(gram[here][:, here] + ridge.diag(), right[here])
        weight = solution[:, :-1]
        found.append((weight, solution[:, -1] - weight @ middle))
    return found, unit


def _units(twin: Twin, inputs: Tensor) -> Tensor:
    units: Tensor = twin.network[:-1](inputs).double()
    return units


def _wanted(twin: Twin, targets: Tensor) -> Tensor:
    return ((targets - twin.mean) / twin.scale).double()


def _tried(penalty: float | None, data: Prepared) -> Sequence[float]:
    if penalty is not None:
        return (penalty,)
    return PENALTIES if len(data.val) else PENALTIES[4:5]


def _normal_equations(
    twin: Twin, data: Prepared, columns: Tensor, wanted: Tensor, rows: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Per channel the matrix and the right-hand side; sums over ``rows``, and over pairs of them for the law."""
    once, times = rows.unique(return_counts=True)
    x, y = columns[once], wanted[once]
    counted = x.T * times
    gram, right = counted @ x, counted @ y
    if not isinstance(twin.law, LumpedHeat):
        return [(gram, right[:, c]) for c in range(y.shape[1])]
    ends = data.pairs(once)
    if not len(ends):
        return [(gram, right[:, c]) for c in range(y.shape[1])]
    often = torch.zeros(len(columns), dtype=torch.float64)
    often[once] = times.double()
    root = often[ends[:, 0]].sqrt()[:, None]  # a row that is listed twice begins two pairs
    pairs = take_pairs(data, ends, data.targets[ends[:, 0]], data.targets[ends[:, 1]])
    time = pairs.time.double()
    rate = (columns[ends[:, 1]] - columns[ends[:, 0]]) / time
    level = (columns[ends[:, 1]] + columns[ends[:, 0]]) / 2
    steady = ((twin.law.steady(pairs.drive) - twin.mean) / twin.scale).double()
    share = twin.law.weight * len(rows) / float(often[ends[:, 0]].sum())  # means in the loss, sums here
    found = []
    for c, tau in enumerate(twin.law.log_tau.exp().tolist()):
        law = root * (tau * rate + level)
        found.append((gram + share * law.T @ law, right[:, c] + share * law.T @ (root[:, 0] * steady[:, c])))
    return found


def normal_cost(twin: Twin, rows: int, units: int) -> int:
    """Multiply-adds of the normal equations: one matrix for all channels; with lumped heat one more for each."""
    return rows * units**2 * (1 + output_layer(twin).out_features * isinstance(twin.law, LumpedHeat))


def solving_cost(twin: Twin, rows: int) -> int:
    """Multiply-adds of one pass over ``rows``, of the normal equations, and of solving them for each penalty."""
    last = output_layer(twin)
    width = last.in_features
    passing = sum(p.numel() for p in twin.network.parameters() if p.ndim == 2) * rows
    return passing + normal_cost(twin, rows, width) + len(PENALTIES) * last.out_features * (width**3 // 3)
