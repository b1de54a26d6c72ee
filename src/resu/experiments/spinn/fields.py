"""Known solutions: Burgers' and the Allen–Cahn equation, on which the physics machinery is proven first.

A network gives a field u(t, x); its derivatives come from autograd, and the loss is the residual of the equation alone,
for initial and boundary values are built in (Lagaris et al. 1998, eq. 4). Residuals count from early times on, as Wang
et al. (arXiv 2203.07404, eq. 3.6) found necessary: a later slice of time counts once the earlier ones are small.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from resu.experiments.spinn.twin import dense_network

__all__ = ["FIELDS", "Equation", "Field", "derivative", "read_solution", "relative_error", "train_field"]

SLICES = 16
ROUND = 300  # iterations of L-BFGS between two draws of points


def derivative(u: Tensor, x: Tensor) -> Tensor:
    """``∂u/∂x`` row by row, itself differentiable; ``[rows, 1]`` each.

    Example:
        >>> x = torch.tensor([[3.0]], requires_grad=True)
        >>> float(derivative(derivative(x**3, x), x).detach())
        18.0
    """
    (found,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return found


@dataclass(frozen=True)
class Equation:
    """An equation in t and x on x in [-1, 1], t in [0, 1].

    Attributes:
        name: Its name.
        file: The reference solution in ``pinn_reference``.
        residual: ``(u, t, x) → [rows, 1]``: what is 0 for a solution.
        initial: ``u(0, x)``.
        features: How x enters the network: periodic, or as it is.
        edge: Factor that is 0 where boundary values are given.
    """

    name: str
    file: str
    residual: Callable[[Tensor, Tensor, Tensor], Tensor]
    initial: Callable[[Tensor], Tensor]
    features: Callable[[Tensor], Tensor]
    edge: Callable[[Tensor], Tensor]


def burgers_residual(u: Tensor, t: Tensor, x: Tensor, nu: float = 0.01 / math.pi) -> Tensor:
    """``u_t + u u_x − ν u_xx``."""
    u_x = derivative(u, x)
    return derivative(u, t) + u * u_x - nu * derivative(u_x, x)


def allen_cahn_residual(u: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """``u_t − 10⁻⁴ u_xx + 5 u³ − 5 u``."""
    return derivative(u, t) - 1e-4 * derivative(derivative(u, x), x) + 5 * u**3 - 5 * u


FIELDS = {
    "burgers": Equation(
        "Burgers",
        "burgers_shock.mat",
        burgers_residual,
        lambda x: -torch.sin(math.pi * x),
        lambda x: x,
        lambda x: 1 - x * x,
    ),
    "allen-cahn": Equation(
        "Allen–Cahn",
        "AC.mat",
        allen_cahn_residual,
        lambda x: x * x * torch.cos(math.pi * x),
        lambda x: torch.cat([f(k * math.pi * x) for k in (1, 2, 3) for f in (torch.cos, torch.sin)], 1),
        torch.ones_like,
    ),
}


class Field(nn.Module):
    """``u(t, x) = u(0, x) + t · edge(x) · network(t, features(x))``: right at the start and at the edges by form.

    Args:
        equation: Which.
        hidden: Widths of the network, float64.
    """

    def __init__(self, equation: Equation, hidden: tuple[int, ...] = (48, 48, 48, 48)) -> None:
        super().__init__()
        self.equation = equation
        width = equation.features(torch.zeros(1, 1)).shape[1]
        self.network = dense_network(1 + width, 1, hidden).double()

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """``[rows, 1]`` each, float64."""
        e = self.equation
        grown: Tensor = self.network(torch.cat([2 * t - 1, e.features(x)], 1))
        return e.initial(x) + t * e.edge(x) * grown

    def residual(self, t: Tensor, x: Tensor) -> Tensor:
        """Residual of the equation at points, ``[rows, 1]``."""
        t, x = t.detach().requires_grad_(), x.detach().requires_grad_()
        return self.equation.residual(self(t, x), t, x)


def _points(rows: int) -> tuple[Tensor, Tensor]:
    """Points in slices of time, each at random within its own cell; sorted by slice."""
    each = max(1, rows // SLICES)
    t = (torch.arange(SLICES).repeat_interleave(each) + torch.rand(SLICES * each)) / SLICES
    cell = torch.arange(each).repeat(SLICES)
    x = 2 * (cell + torch.rand(SLICES * each)) / each - 1
    return t.double()[:, None], x.double()[:, None]


def _causal(residual: Tensor, patience: float) -> Tensor:
    slices = residual.square().reshape(SLICES, -1).mean(1)
    before = torch.cat([slices.new_zeros(1), slices.detach().cumsum(0)[:-1]])
    return (torch.exp(-patience * before) * slices).mean()


def train_field(field: Field, *, adam: int, lbfgs: int, rows: int = 2048, rate: float = 2e-3) -> Field:
    """Train in place: Adam with new points each step and causal weights, then L-BFGS in rounds.

    Half of the points of a round are drawn where the residual is large.

    Args:
        field: What to train; masks held on it stay.
        adam: Steps of Adam.
        lbfgs: Iterations of L-BFGS.
        rows: Points per step.
        rate: Highest learning rate of Adam.
    """
    if adam:
        optimizer = torch.optim.Adam(field.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, adam)
        for _ in range(adam):
            optimizer.zero_grad()
            _causal(field.residual(*_points(rows)), 1.0).backward()
            optimizer.step()
            schedule.step()
    for left in range(lbfgs, 0, -ROUND):
        _second_order(field, min(ROUND, left), *_drawn(field, rows), *_points(rows))
    return field


def _drawn(field: Field, rows: int) -> tuple[Tensor, Tensor]:
    """Points drawn in proportion to the residual (Wu et al. 2023, eq. 2): a shock is where nothing else is wrong."""
    t, x = _points(8 * rows)
    chosen = torch.multinomial(field.residual(t, x).detach().abs().flatten(), rows)
    return t[chosen], x[chosen]


def _second_order(field: Field, iterations: int, *points: Tensor) -> None:
    t, x = torch.cat(points[::2]), torch.cat(points[1::2])
    optimizer = torch.optim.LBFGS(
        field.parameters(),
        max_iter=iterations,
        max_eval=2 * iterations,
        history_size=50,
        tolerance_grad=1e-10,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = field.residual(t, x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


def read_solution(equation: Equation, folder: str | os.PathLike[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Reference solution: t ``[nt]``, x ``[nx]``, u ``[nt, nx]``, float64.

    Raises:
        ImportError: Without scipy, which reads these files.
        FileNotFoundError: If the file is absent.
    """
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ImportError(
            "the reference solutions are MATLAB files; reading them needs scipy: pip install 'resu-torch[spinn]'"
        ) from None
    path = Path(folder) / "pinn_reference" / equation.file
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; name the folder that holds pinn_reference/{equation.file}")
    data = loadmat(path)
    t = data["t"] if "t" in data else data["tt"]
    u = data["usol"] if "usol" in data else data["uu"]
    return torch.tensor(t.ravel()), torch.tensor(data["x"].ravel()), torch.tensor(u).T.contiguous().double()


def relative_error(field: Field, solution: tuple[Tensor, Tensor, Tensor]) -> float:
    """Relative L2 error over the whole grid of a reference solution."""
    t, x, u = solution
    grid_t, grid_x = torch.meshgrid(t.double(), x.double(), indexing="ij")
    with torch.no_grad():
        found = field(grid_t.reshape(-1, 1), grid_x.reshape(-1, 1)).reshape(u.shape)
    return float((found - u).norm() / u.norm())
