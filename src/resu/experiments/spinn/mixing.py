"""Shares of candidates that did best for tools whose whole life is known (Wolpert 1992; Breiman 1996).

Predictions of a linear layer add up, so a mixture of layers is a layer. Which candidate is best differs from tool to
tool, and a dozen tools do not tell it; a mixture depends on them far less than a choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["best_single", "mixture"]

ROUNDS = 10


def mixture(products: Sequence[Tensor]) -> Tensor:
    """Shares ``w ≥ 0`` that sum to 1 and minimise ``Σ log wᵀ G w`` over tools, float64 ``[candidates]``.

    ``wᵀ G w`` is the sum of squared errors of the mixture for one tool. With its logarithm every tool has a noise of
    its own (the likelihood of normal errors at the best variance, per row), so no tool that wears fast or lives long
    outvotes the others. No share can be moved to another candidate and lower the sum.

    Args:
        products: Of each tool ``G``, ``[candidates, candidates]``: ``Σ eᵢ eⱼ`` over rows, for errors of candidates i
            and j.

    Raises:
        ValueError: If there is none, or one is not finite.

    Example:
        >>> a = torch.tensor([[2.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)  # errors that point to opposite sides
        >>> [round(share, 3) for share in mixture([a, 5 * a]).tolist()]
        [0.5, 0.5]
    """
    if not products:
        raise ValueError("shares need the errors of at least one tool whose life is known")
    gram = torch.stack([g.double() / g.diagonal().mean().clamp(min=1e-30) for g in products])
    if not gram.isfinite().all():
        raise ValueError("products of errors must be finite; is there a NaN in the recording or in a twin?")
    logits = torch.zeros(gram.shape[1], dtype=torch.float64)
    for _ in range(ROUNDS):
        shares = _descend(gram, logits).softmax(0).requires_grad_()
        (slope,) = torch.autograd.grad(_lost(gram, shares), shares)
        shares = shares.detach()
        # A softmax does not bring a share back that has come near 0, though it may be wanted at the end.
        missed = slope < slope @ shares - 1e-4
        if not missed.any():
            break
        logits = (shares + 0.01 * missed).clamp(min=1e-30).log()
    return shares


def _lost(gram: Tensor, shares: Tensor) -> Tensor:
    return torch.einsum("i,nij,j->n", shares, gram, shares).clamp(min=1e-30).log().sum()


def _descend(gram: Tensor, start: Tensor) -> Tensor:
    """Logits of shares with a lower sum."""
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=1000, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        lost = _lost(gram, logits.softmax(0))
        lost.backward()
        return lost

    optimizer.step(loss)
    return logits.detach()


def best_single(products: Sequence[Tensor]) -> Tensor:
    """Shares with all on the one candidate that minimises the same sum.

    Example:
        >>> best_single([torch.tensor([[4.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])])
        tensor([0., 1.], dtype=torch.float64)
    """
    lost = torch.stack([g.diagonal().double() for g in products]).clamp(min=1e-30).log().sum(0)
    return torch.nn.functional.one_hot(lost.argmin(), len(lost)).double()
