"""Which differences between methods are larger than the noise of test examples and seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, stack

__all__ = ["Verdict", "verdicts"]


@dataclass(frozen=True)
class Verdict:
    """A method against the best one: the difference of mean test accuracies and its standard error."""

    method: str
    difference: float
    error: float

    @property
    def is_noise(self) -> bool:
        """Whether the difference is within two standard errors."""
        return abs(self.difference) <= 2 * self.error


def verdicts(correct: Mapping[str, Sequence[Tensor]]) -> tuple[str, list[Verdict]]:
    """The method with the highest mean test accuracy, and every other one against it.

    The standard error joins two sources: which test examples were drawn (both methods see the same ones, so
    the error is that of the mean difference per example) and which seeds (their variance, where there are
    two or more).

    Args:
        correct: ``{method: [which test examples are right, one tensor per seed]}``, the seeds in the same order.

    Returns:
        The name of the best, and a verdict on each of the others.
    """
    rights = {name: stack(list(some)).double() for name, some in correct.items()}
    best = max(rights, key=lambda name: float(rights[name].mean()))
    found = []
    for name, right in rights.items():
        if name == best:
            continue
        per_example = (right - rights[best]).mean(dim=0)
        variance = float(per_example.var()) / per_example.numel()
        if len(right) > 1:
            per_seed = right.mean(dim=1) - rights[best].mean(dim=1)
            variance += float(per_seed.var()) / len(right)
        found.append(Verdict(name, 100 * float(per_example.mean()), 100 * math.sqrt(variance)))
    return best, found
