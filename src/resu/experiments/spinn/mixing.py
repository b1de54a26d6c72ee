"""Shares of candidates that did best for tools whose whole life is known (Wolpert 1992; Breiman 1996).

Predictions of a linear layer add up, so a mixture of layers is a layer. Which candidate is best differs from tool to
tool, and a dozen tools do not tell it; a mixture depends on them far less than a choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["best_single", "mixture"]


def mixture(products: Sequence[Tensor]) -> Tensor:
    """Shares ``w ≥ 0`` that sum to 1 and minimise ``Σ log wᵀ G w`` over tools, float64 ``[candidates]``.

    ``wᵀ G w`` is the sum of squared errors of the mixture for one tool. With its logarithm every tool has a noise of
    its own (the likelihood of normal errors at the best variance), so no tool that wears fast outvotes the others.

    Args:
        products: Of each tool ``G``, ``[candidates, candidates]``: ``Σ eᵢ eⱼ`` over rows, for errors of candidates i
            and j.

    Raises:
        ValueError: If there is none.

    Example:
        >>> a = torch.tensor([[2.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)  # errors that point to opposite sides
        >>> [round(share, 3) for share in mixture([a, 5 * a]).tolist()]
        [0.5, 0.5]
    """
    if not products:
        raise ValueError("shares need the errors of at least one tool whose life is known")
    gram = torch.stack([g.double() / g.diagonal().mean().clamp(min=1e-30) for g in products])
    logits = torch.zeros(gram.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=1000, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        shares = logits.softmax(0)
        lost = torch.einsum("i,nij,j->n", shares, gram, shares).clamp(min=1e-30).log().sum()
        lost.backward()
        return lost

    optimizer.step(loss)
    return logits.detach().softmax(0)


def best_single(products: Sequence[Tensor]) -> Tensor:
    """Shares with all on the one candidate that minimises the same sum.

    Example:
        >>> best_single([torch.tensor([[4.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])])
        tensor([0., 1.], dtype=torch.float64)
    """
    lost = torch.stack([g.diagonal().double() for g in products]).clamp(min=1e-30).log().sum(0)
    return torch.nn.functional.one_hot(lost.argmin(), len(lost)).double()
