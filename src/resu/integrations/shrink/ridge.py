"""Ridge regression of a layer's outputs on its inputs, from sums over tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Sums"]


@dataclass
class Sums:
    """Sums over tokens of inputs, targets and their products, in float64.

    Attributes:
        tokens: How many were added.
        a: Of inputs ``[in]``.
        t: Of targets ``[out]``.
        aa: Of products of inputs ``[in, in]``.
        ta: Of targets with inputs ``[out, in]``.
        tt: Of the squares of targets.

    Example:
        >>> sums, a = Sums(), torch.tensor([[1.0], [2.0], [3.0]])
        >>> sums.add(a, 2 * a + 1)
        >>> weight, bias = sums.fit(torch.zeros(1, 1, dtype=torch.float64), penalty=0.0, centred=True)
        >>> weight.item(), bias.item(), round(sums.error(weight, bias), 6)
        (2.0, 1.0, 0.0)
    """

    tokens: int = 0
    a: Any = 0.0
    t: Any = 0.0
    aa: Any = 0.0
    ta: Any = 0.0
    tt: float = 0.0

    def add(self, a: Tensor, t: Tensor) -> None:
        """Add tokens: inputs ``[tokens, in]`` and targets ``[tokens, out]``, float32 or float64."""
        # float32 holds the products of one batch; sums over batches need more.
        aa, ta = a.T @ a, t.T @ a
        self.aa, self.ta = (self.aa.add_(aa), self.ta.add_(ta)) if self.tokens else (aa.double(), ta.double())
        self.a, self.t = self.a + a.sum(0, dtype=torch.float64), self.t + t.sum(0, dtype=torch.float64)
        self.tt += float(t.double().square().sum())
        self.tokens += len(a)

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.tokens + other.tokens,
            self.a + other.a,
            self.t + other.t,
            self.aa + other.aa,
            self.ta + other.ta,
            self.tt + other.tt,
        )

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """The mean over tokens of ``‖t − W a − b‖²``."""
        off = self.tt - 2 * (bias @ self.t) + self.tokens * (bias @ bias)
        cross = self.ta - torch.outer(bias, self.a)
        return float(off - 2 * (weight * cross).sum() + (weight @ self.aa * weight).sum()) / max(self.tokens, 1)

    def fit(self, weight: Tensor, penalty: float, centred: bool) -> tuple[Tensor, Tensor]:
        """Weight and bias that minimise ``E‖t − W'a − b‖² + λ‖W' − W‖²``, float64.

        Args:
            weight: What is held to, float64 ``[out, in]``.
            penalty: λ, in means of the diagonal of the inputs' second moments.
            centred: Whether there is a bias, which takes up the means, so that moments are about them; else it is 0.
        """
        return next(self.fits(weight, (penalty,), centred))

    def fits(self, weight: Tensor, penalties: Iterable[float], centred: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """:meth:`fit` for one penalty after another."""
        n = max(self.tokens, 1)
        inner, ta, a, t = self.aa / n, self.ta / n, self.a / n, self.t / n
        if centred:
            inner.addr_(a, a, alpha=-1)
            ta.addr_(t, a, alpha=-1)
        moments = inner.diagonal().clone()
        for penalty in penalties:
            damping = penalty * float(moments.mean().clamp(min=1e-30))
            inner.diagonal().copy_(moments + damping)
            fitted = torch.linalg.solve(inner, (ta + damping * weight).T).T
            yield fitted, t - fitted @ a if centred else torch.zeros_like(t)
