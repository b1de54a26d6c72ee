"""AC/DC: dense and sparse phases in turn."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from resu.training.algorithms.base import Algorithm, View, algorithms

__all__ = ["ACDC"]


@algorithms.register("ac-dc")
@dataclass(frozen=True, kw_only=True)
class ACDC(Algorithm):
    """Alternating compressed and decompressed training (AC/DC; Peste et al., arXiv 2106.12379, algorithm 1).

    Dense until ``begin_step``; then phases of ``interval`` steps, sparse and dense in turn; sparse from ``end_step``
    on. A sparse phase keeps the largest |w| at its start; a dense phase trains every weight, those that were pruned
    starting at 0 with zero optimizer state.

    Cost: dense phases cost what dense training costs, and memory is that of dense training throughout. Fails: in short
    runs, where the last sparse phase has little time to heal. Differs from the authors' code: exact counts, any
    pattern and distribution (theirs ranks all layers together, ``distribution="global"``).

    Raises:
        ValueError: Without ``end_step``: a run could end dense.

    Example:
        >>> rule = ACDC(sparsity=0.9, begin_step=100, interval=50, end_step=250)
        >>> [(step, rule.target(step)) for step in range(0, 350, 50) if rule.due(step)]
        [(100, 0.9), (150, 0.0), (200, 0.9), (250, 0.9)]
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.end_step is None:
            raise ValueError("AC/DC must end in a sparse phase: give end_step, where the last one begins")

    def target(self, step: int) -> float:
        """The final sparsity in sparse phases, else 0."""
        assert self.end_step is not None
        if step < self.begin_step:
            return 0.0
        sparse = step >= self.end_step or (step - self.begin_step) // self.interval % 2 == 0
        return self.sparsity if sparse else 0.0

    def scores(self, view: View) -> Tensor:
        """|w|."""
        return view.weight.abs()
