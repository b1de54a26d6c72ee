"""Training under a mask, restated with Python floats: what the rules' restatements move the masks of.

A position that changes sides starts anew: weight 0, optimizer state 0 (the weight of one that is dropped is 0 too).
"""

from __future__ import annotations

import math


class Layer:
    """Weights, mask and optimizer state of one layer, as flat lists."""

    def __init__(self, weights: list[float]) -> None:
        n = len(weights)
        self.w, self.mask = list(weights), [True] * n
        self.first, self.second, self.steps = [0.0] * n, [0.0] * n, 0

    def sgd(self, g: list[float], lr: float, momentum: float, decay: float) -> None:
        """Heavy-ball momentum, weight decay in the gradient."""
        for i in range(len(self.w)):
            if self.mask[i]:
                self.first[i] = momentum * self.first[i] + g[i] + decay * self.w[i]
                self.w[i] -= lr * self.first[i]

    def adamw(self, g: list[float], lr: float, b1: float, b2: float, decay: float) -> None:
        """Adam with decoupled decay; the count of steps is the layer's and never starts anew."""
        self.steps += 1
        for i in range(len(self.w)):
            if self.mask[i]:
                self.first[i] = b1 * self.first[i] + (1 - b1) * g[i]
                self.second[i] = b2 * self.second[i] + (1 - b2) * g[i] ** 2
                mean, square = self.first[i] / (1 - b1**self.steps), self.second[i] / (1 - b2**self.steps)
                self.w[i] -= lr * decay * self.w[i] + lr * mean / (math.sqrt(square) + 1e-8)

    def become(self, mask: list[bool]) -> None:
        """Take a new mask."""
        for i in range(len(self.w)):
            if mask[i] != self.mask[i]:
                self.w[i] = self.first[i] = self.second[i] = 0.0
        self.mask = mask


def ranked(candidates: list[int], score: list[float]) -> list[int]:
    """Candidates from the highest score to the lowest; of equals the lower index first."""
    return sorted(candidates, key=lambda i: (-score[i], i))


def best(score: list[float], keep: int) -> list[bool]:
    """The mask of the ``keep`` highest scores."""
    chosen = set(ranked(list(range(len(score))), score)[:keep])
    return [i in chosen for i in range(len(score))]


def part(fraction: float, n: int) -> int:
    """``floor(fraction · n)``; the small addend keeps a product that is whole from falling below itself."""
    return math.floor(fraction * n + 1e-9)
