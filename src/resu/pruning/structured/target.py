"""How much to remove so that a model has so many parameters, multiply-adds, or takes so long on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from resu.pruning.structured.sizes import count_macs, count_parameters, latencies

__all__ = ["TARGETS", "Reached", "meet_target", "smallest_step"]

TARGETS = ("units", "parameters", "macs", "latency")
_STEPS, _COARSE_STEPS = 1 << 24, 1 << 10  # of the sparsity of units: counts are exact, times are not
_TOLERANCE = 0.05

Kept = Mapping[str, Tensor]


@dataclass(frozen=True)
class Reached:
    """What a target came to.

    Attributes:
        target: ``"units"``, ``"parameters"``, ``"macs"`` or ``"latency"``.
        asked: The fraction of it to remove.
        reached: The fraction removed.
        met: Whether what is left is within 5 % of what was to be left.
    """

    target: str
    asked: float
    reached: float

    @property
    def met(self) -> bool:
        return abs(self.reached - self.asked) <= _TOLERANCE * (1 - self.asked)


def meet_target(
    model: nn.Module,
    target: str,
    sparsity: float,
    inputs: Any,
    kept_at: Callable[[float], Kept],
    shrunk: Callable[[Kept], nn.Module],
    *,
    dense: nn.Module | float | None = None,
    least: str = "one unit left of each group that may be removed from",
) -> tuple[Kept, Reached]:
    """The units to keep so that ``sparsity`` of the target is removed, by a search over the sparsity of units.

    Parameters and multiply-adds are counted, and what is left is at most what was asked, as near to it as whole units
    allow. Latency is measured, the model and the smaller one in turns; of what was tried, the nearest is taken.

    Args:
        model: The present model.
        target: ``"parameters"``, ``"macs"`` or ``"latency"``.
        sparsity: The fraction of it to remove.
        inputs: Example inputs; multiply-adds and latency are of a pass over them.
        kept_at: ``kept_at(sparsity of units) -> {group: bool per unit}``.
        shrunk: ``shrunk(kept)``: a smaller copy of the model.
        dense: What the sparsity is a fraction of: a size, or for latency a model; None: the present model.
        least: What is left at the highest sparsity of units, for the error message.

    Raises:
        ValueError: If even the fewest units leave more than 5 % too much; it says how much could be removed.
    """
    reference = model if not isinstance(dense, nn.Module) else dense
    counts: dict[str, Callable[[nn.Module], int]] = {
        "parameters": count_parameters,
        "macs": lambda counted: count_macs(counted, inputs),
    }
    count = counts.get(target)
    whole = float(dense) if isinstance(dense, (int, float)) else float(count(reference)) if count else 1.0
    seen: dict[tuple[int, ...], float] = {}
    tried: list[tuple[float, Kept]] = []

    def left(kept: Kept) -> float:
        """The fraction of the target that is left."""
        key = tuple(int(mask.sum()) for mask in kept.values())
        if key not in seen:
            small = shrunk(kept)
            seen[key] = count(small) / whole if count else latencies([reference, small], inputs).ratios[1]
            tried.append((seen[key], kept))
        return seen[key]

    def at(step: int) -> Kept:
        return kept_at(min(step / steps, 1 - 1e-9))

    wanted = 1.0 - sparsity
    steps, close = (_STEPS, 0.0) if count else (_COARSE_STEPS, 0.01 * wanted)
    most = left(at(steps))
    if not count and most > wanted * (1 + _TOLERANCE):  # a busy machine may mislead once
        seen.clear()
        most = min(most, left(at(steps)))
    if most > wanted * (1 + _TOLERANCE):
        raise ValueError(
            f"{target} cannot be reduced by {sparsity:.0%}: with {least}, {1 - most:.0%} are gone; ask for less, or "
            "let more layers be removed from (include, exclude)"
        )
    step = smallest_step(lambda step: left(at(step)), steps, wanted, close)
    if count and step:
        _between(at(step - 1), at(step), left, wanted)
    slower = [entry for entry in tried if entry[0] > wanted]  # none, if an earlier step went further than it had to
    if not count and slower and all(abs(value - wanted) > _TOLERANCE * wanted for value, _ in tried):
        # Time falls in steps, where all layers drop below a multiple of what the processor takes at once: not all do.
        slow = min(slower, key=lambda entry: entry[0])
        fast = max((entry for entry in tried if entry[0] <= wanted), key=lambda entry: entry[0])
        _between(slow[1], fast[1], left, wanted)
    enough = [entry for entry in tried if entry[0] <= wanted] if count else tried
    best, kept = min(enough or tried, key=lambda entry: abs(entry[0] - wanted))
    return kept, Reached(target, sparsity, 1.0 - best)


def smallest_step(cost: Callable[[int], float], high: int, wanted: float, close: float = 0.0) -> int:
    """The smallest step in ``[0, high]`` whose cost is at most ``wanted``; or the first one tried that is close to it.

    Costs may take seconds each and are nearly straight, so what is tried next is where a line through the ends of the
    bracket says; and the middle whenever a line did not halve it, so there are never more than ``2 log2(high) + 4``.

    Args:
        cost: ``cost(step)``, which never rises from one step to the next (but for noise, if it is measured).
        high: The last step; it is the answer where even its cost is larger.
        wanted: What the cost may be.
        close: A cost less than this away from ``wanted`` will do; 0: exactly the smallest step.

    Example:
        >>> smallest_step(lambda step: 100 - step, 99, 36.5)
        64
    """
    below = cost(high)
    if below > wanted or abs(below - wanted) < close:
        return high
    low, above = 0, cost(0)
    if above <= wanted:
        return 0
    halve = False
    while high - low > 1:
        span = high - low
        line = low + round(span * (above - wanted) / (above - below))
        guess = (low + high) // 2 if halve else min(max(line, low + 1), high - 1)
        value = cost(guess)
        if abs(value - wanted) < close:
            return guess
        if value > wanted:
            low, above = guess, value
        else:
            high, below = guess, value
        halve = not halve and 2 * (high - low) > span
    return high


def _between(more: Kept, fewer: Kept, left: Callable[[Kept], float], wanted: float) -> None:
    """Try what lies between two neighbours: as many groups as are needed take their fewer units."""
    differ = [name for name in more if not bool((more[name] == fewer[name]).all())]
    low, high = 0, len(differ)
    while high - low > 1:
        middle = (low + high) // 2
        mixed = {name: fewer[name] if name in differ[:middle] else more[name] for name in more}
        low, high = (middle, high) if left(mixed) > wanted else (low, middle)
