"""How much to take away for a wanted number of parameters, multiply-adds or milliseconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from torch import Tensor

from resu.integrations.shrink.measure import Costs, measured_latency, smaller_copy
from resu.integrations.shrink.plan import Fractions, kept_counts
from resu.pruning.structured.target import smallest_step

__all__ = ["METRICS", "Target", "solve_target"]

METRICS = ("params", "macs", "latency")
_CLOSE = 0.015  # of the target; closer than that a latency is noise
_ROUNDS, _LEISURE, _CORRECTIONS = 9, 31, 3


@dataclass(frozen=True)
class Target:
    """What the smaller model may cost, as a part of what the model costs as it is.

    Attributes:
        metric: ``"params"``, ``"macs"`` or ``"latency"`` (seconds of a forward pass, measured in turns).
        value: In (0, 1).
    """

    metric: str
    value: float

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"unknown target {self.metric!r}; known: {', '.join(METRICS)}")
        if not 0 < self.value < 1:
            raise ValueError(f"the target for {self.metric} must lie in (0, 1), got {self.value!r}; 0.5 means half")


def solve_target(
    model: Any,
    costs: Costs,
    inputs: Mapping[str, Tensor],
    target: Target,
    given: Fractions,
    free: Sequence[str],
    blocks: Sequence[int] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Fractions:
    """The fractions that meet a target: one for all kinds that are free, then the width alone to hit it closely.

    Heads are few, so one fraction for both mostly jumps over the target; the width then gives some back. Parameters and
    multiply-adds are at most what is asked for. A latency is measured, on this machine with the threads as they are
    set, until it is within 3 % or three corrections were made; of these the closest is taken.

    Args:
        model: As it is; not changed.
        costs: Of the model.
        inputs: What latencies are measured on.
        target: What to reach.
        given: Fractions of the kinds that are not free, and ``round_to``.
        free: ``"heads"``, ``"ffn"`` or both.
        blocks: Which blocks stay; None: all.
        progress: Told what was tried.

    Raises:
        ValueError: If even the smallest model costs more.
    """
    steps = max(site.count for site in costs.sites if site.kind in free)
    tried: dict[tuple[int, ...], float] = {}

    def cost(fractions: Fractions) -> float:
        counts = kept_counts(costs.sites, fractions)
        key = tuple(counts.values())
        if key not in tried:
            tried[key] = _cost(model, costs, inputs, target.metric, counts, blocks, _ROUNDS)
            if progress is not None and target.metric == "latency":
                progress(f"{target.metric} {tried[key]:.3f}x")
        return tried[key]

    def common(step: int) -> Fractions:
        part = Fraction(step, steps)
        return replace(given, heads=part if "heads" in free else given.heads, ffn=part if "ffn" in free else given.ffn)

    least = cost(common(steps - 1))
    if least > target.value:
        raise ValueError(
            f"{target.metric} cannot be {target.value:g} of what they are: with all of {' and '.join(free)} but the "
            f"least removed they are still {least:.3g} (embeddings and other parts stay); remove blocks too, or ask "
            "for less"
        )
    exact = target.metric != "latency"

    def search(wanted: float) -> Fractions:
        close = 0.0 if exact else _CLOSE * wanted
        step = smallest_step(lambda k: cost(common(k)), steps - 1, wanted, close)
        found = common(step)
        if len(free) == 2:
            step = smallest_step(lambda k: cost(replace(found, ffn=Fraction(k, steps))), step, wanted, close)
            found = replace(found, ffn=Fraction(step, steps))
        return found

    found, wanted = search(target.value), target.value
    if exact:
        return found
    best = (math.inf, found)
    for corrections_left in reversed(range(_CORRECTIONS + 1)):
        # What was measured in a hurry is measured again at leisure, and aimed at anew if it was off.
        counts = kept_counts(costs.sites, found)
        off = _cost(model, costs, inputs, target.metric, counts, blocks, _LEISURE) / target.value
        best = min(best, (abs(off - 1), found), key=lambda one: one[0])
        if abs(off - 1) <= 2 * _CLOSE or not corrections_left:
            break
        wanted, tried = max(wanted / off, least), {}
        found = search(wanted)
    return best[1]


def _cost(
    model: Any,
    costs: Costs,
    inputs: Mapping[str, Tensor],
    metric: str,
    counts: Mapping[str, int],
    blocks: Sequence[int] | None,
    rounds: int,
) -> float:
    parameters, macs = costs.after(counts, blocks)
    if metric == "params":
        return parameters / costs.parameters
    if metric == "macs":
        return macs / costs.macs
    return measured_latency([model, smaller_copy(model, counts, blocks)], inputs, rounds).ratios[1]
