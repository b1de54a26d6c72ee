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

__all__ = ["PENALTIES", "Solved", "output_layer", "solve_output", "solving_cost"]

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
        rows: Rows that are fitted; a row that is listed twice counts twice.
        penalty: In units of the hidden units' mean variance; None: of :data:`PENALTIES` the one that is best on the
            validation part.
    """
    last = output_layer(twin)
    hidden = twin.network[:-1](data.inputs).double()
    wanted = ((data.targets - twin.mean) / twin.scale).double()
    unit, middle = float(hidden[rows].var(0).mean()), hidden[rows].mean(0)
    # The bias is one more column, which costs nothing; units about their mean keep it apart from the rest.
    columns = torch.cat([hidden - middle, torch.ones_like(hidden[:, :1])], 1)
    normal = _normal_equations(twin, data, columns, wanted, rows)
    free = torch.cat([last.weight != 0, torch.ones_like(last.bias, dtype=torch.bool)[:, None]], 1)
    found = {}
    for tried in _tried(penalty, data):
        solution = torch.zeros_like(free, dtype=torch.float64)
        for c, (gram, right) in enumerate(normal):
            here = free[c].nonzero()[:, 0]
            ridge = torch.full((len(here),), tried * unit, dtype=torch.float64)
            ridge[-1] = 0.0
            solution[c, here] = torch.linalg.solve(gram[here][:, here] + ridge.diag(), right[here])
        error = columns[data.val] @ solution.T - wanted[data.val]
        found[tried] = (float(error.square().sum()), solution)
    best = min(found, key=lambda p: found[p][0])
    weight = found[best][1][:, :-1]
    last.weight.copy_(weight)
    last.bias.copy_(found[best][1][:, -1] - weight @ middle)
    return Solved(best, best * unit / (len(rows) * len(last.weight)))


def _tried(penalty: float | None, data: Prepared) -> Sequence[float]:
    if penalty is not None:
        return (penalty,)
    return PENALTIES if len(data.val) else PENALTIES[4:5]


def _normal_equations(
    twin: Twin, data: Prepared, columns: Tensor, wanted: Tensor, rows: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Per channel the matrix and the right-hand side; sums over ``rows``, and over pairs of them for the law."""
    x, y = columns[rows], wanted[rows]
    gram, right = x.T @ x, x.T @ y
    if not isinstance(twin.law, LumpedHeat):
        return [(gram, right[:, c]) for c in range(y.shape[1])]
    ends = data.pairs(rows)
    pairs = take_pairs(data, ends, data.targets[ends[:, 0]], data.targets[ends[:, 1]])
    time = pairs.time.double()
    rate = (columns[ends[:, 1]] - columns[ends[:, 0]]) / time
    level = (columns[ends[:, 1]] + columns[ends[:, 0]]) / 2
    steady = ((twin.law.steady(pairs.drive) - twin.mean) / twin.scale).double()
    share = twin.law.weight * len(rows) / len(ends)  # means in the loss, sums here
    found = []
    for c, tau in enumerate(twin.law.log_tau.exp().tolist()):
        law = tau * rate + level
        found.append((gram + share * law.T @ law, right[:, c] + share * law.T @ steady[:, c]))
    return found


def solving_cost(network: nn.Sequential, rows: int) -> int:
    """Multiply-adds of one pass over ``rows``, of the normal equations, and of solving them for each penalty."""
    last = network[-1]
    assert isinstance(last, nn.Linear)
    width = last.in_features
    passing = sum(p.numel() for p in network.parameters() if p.ndim == 2) * rows
    return passing + rows * width**2 + len(PENALTIES) * last.out_features * (width**3 // 3)
