"""How many weights go at each stage of iterative pruning, so that the last one reaches the target."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from resu.core.counting import check_sparsity
from resu.pruning.compression import table

__all__ = ["StagePlan", "plan_stages"]

_TOLERANCE = Fraction(1, 2000)  # a target that is met to 0.05 % is met: what a figure with one decimal can tell


@dataclass(frozen=True)
class StagePlan:
    """Cumulative stages: each prunes a fraction of what is still active.

    Attributes:
        target: Sparsity after the last stage.
        fractions: Per stage, the fraction of the weights still active that goes.
        sparsities: Per stage, the sparsity reached; the last is ``target`` itself.
    """

    target: float
    fractions: tuple[float, ...]
    sparsities: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.fractions)

    def __iter__(self) -> Iterator[tuple[float, float]]:
        """``(fraction, sparsity)`` per stage."""
        return iter(zip(self.fractions, self.sparsities, strict=True))

    def __str__(self) -> str:
        rows = [[f"{i}", f"{f:.4f}", f"{s:.4f}"] for i, (f, s) in enumerate(self, 1)]
        return "\n".join(table(["stage", "of what is active", "sparsity"], rows))


def plan_stages(target: float, stages: int | Sequence[float]) -> StagePlan:
    """Stages that really reach ``target``.

    Removing the fractions ``f_1, …, f_k`` of what is active each time leaves ``Π (1 - f_i)``, which is more than
    ``1 - Σ f_i``: 30, 30, 20 and 20 % make 68.6 %, not 100 % and not 70 %.

    Args:
        target: Sparsity after the last stage, in (0, 1).
        stages: How many (equal fractions are solved for), or the fractions themselves (they are checked, exactly in
            decimals; within 0.05 % of the target counts as met, and the difference is spread over the stages).

    Returns:
        The plan; ``.sparsities[-1] == target`` and the fractions multiply to it.

    Raises:
        ValueError: If a list misses the target, or a number is out of range.

    Example:
        >>> [round(f, 4) for f in plan_stages(0.7, 4).fractions]
        [0.2599, 0.2599, 0.2599, 0.2599]
        >>> plan_stages(0.7, [0.2, 0.2, 0.15, 0.15])
        Traceback (most recent call last):
        ValueError: removing 0.2, 0.2, 0.15, 0.15 of what is still active reaches only 53.8 %, not 70 %; ...
    """
    if isinstance(stages, bool) or not isinstance(stages, (int, Sequence)) or isinstance(stages, str):
        raise TypeError(f"stages is a number of stages or a list of fractions, got {stages!r}")
    check_sparsity(target, "target")
    if target == 0:
        raise ValueError("a target of 0 leaves nothing to prune")
    if isinstance(stages, int):
        if stages < 1:
            raise ValueError(f"there has to be at least one stage, got {stages}")
        each = [-math.expm1(i / stages * math.log1p(-target)) for i in range(1, stages)]
        return _plan(target, [*(round(s, 12) for s in each), target])
    reached = reached_by(stages)
    if abs(reached[-1] - Fraction(str(target))) > _TOLERANCE:
        text = ", ".join(f"{f:g}" for f in stages)
        short = reached[-1] < Fraction(str(target))
        equal = plan_stages(target, len(stages)).fractions[0]
        raise ValueError(
            f"removing {text} of what is still active reaches {'only ' if short else ''}{_percent(reached[-1])}, not "
            f"{_percent(Fraction(str(target)))}; plan_stages({target:g}, {len(stages)}) solves for fractions that do "
            f"({equal:.4f} each), or give the target {float(round(reached[-1], 4)):g}"
        )
    # Where the list meets the target to 0.05 % and no better, every stage gives its share of the difference.
    stretch = math.log1p(-target) / math.log(1 - reached[-1]) if reached[-1] != Fraction(str(target)) else 1.0
    each = [float(s) if stretch == 1.0 else -math.expm1(stretch * math.log(1 - s)) for s in reached[:-1]]
    return _plan(target, [*(round(s, 12) for s in each), target])


def reached_by(fractions: Sequence[float]) -> list[Fraction]:
    """Exact sparsity after each stage, the fractions read as the decimals the user wrote."""
    if not fractions:
        raise ValueError("there has to be at least one stage, got an empty list")
    left, reached = Fraction(1), []
    for index, fraction in enumerate(fractions, 1):
        check_sparsity(fraction, f"the fraction of stage {index}")
        if fraction == 0:
            raise ValueError(f"stage {index} prunes nothing (fraction 0); leave it out")
        left *= 1 - Fraction(str(fraction))
        reached.append(1 - left)
    return reached


def _plan(target: float, sparsities: Sequence[float]) -> StagePlan:
    before = [0.0, *sparsities[:-1]]
    if any(b >= s for b, s in zip(before, sparsities, strict=True)):
        raise ValueError(f"{len(sparsities)} stages to {target!r} are too fine: one of them would prune nothing")
    fractions = tuple((s - b) / (1 - b) for b, s in zip(before, sparsities, strict=True))
    return StagePlan(target, fractions, tuple(sparsities))


def _percent(x: Fraction) -> str:
    return f"{round(float(100 * x), 1):g} %"
