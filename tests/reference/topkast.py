"""Top-KAST, restated from Jayakumar et al., arXiv 2106.03517, section 2, in plain Python, trained by momentum SGD.

Weights outside of A are kept aside (they take no part in the forward pass) and do not decay.
"""

from __future__ import annotations

from tests.reference.masked_training import best, ranked


class Layer:
    """All weights θ of a layer, the set A of the forward pass, the set B ⊇ A of the backward pass."""

    def __init__(self, weights: list[float], density: float) -> None:
        self.theta, self.v, self.density = list(weights), [0.0] * len(weights), density
        self.a: list[bool] = []
        self.b: list[bool] = [True] * len(weights)

    def choose(self, forward: int, backward: int) -> None:
        """A: the largest |θ|; B: more of the largest. What enters or leaves B forgets its momentum."""
        size = [abs(x) for x in self.theta]
        order = ranked(list(range(len(size))), size)
        self.a = best(size, forward)
        b = [i in set(order[:backward]) for i in range(len(size))]
        for i in range(len(size)):
            if b[i] != self.b[i]:
                self.v[i] = 0.0
        self.b = b

    def effective(self) -> list[float]:
        """What the forward pass multiplies with."""
        return [x if inside else 0.0 for x, inside in zip(self.theta, self.a, strict=True)]

    def step(self, g: list[float], lr: float, momentum: float, decay: float, lam: float) -> None:
        """``g``: gradient of the sparse forward; the regularizer of equation 4 is ``λ|θ|`` in A, else ``λ|θ|/D``."""
        for i in range(len(self.theta)):
            if not self.b[i]:
                continue
            sign = (self.theta[i] > 0) - (self.theta[i] < 0)
            grad = g[i] + lam * (sign if self.a[i] else sign / self.density)
            grad += decay * self.theta[i] if self.a[i] else 0.0
            self.v[i] = momentum * self.v[i] + grad
            self.theta[i] -= lr * self.v[i]
