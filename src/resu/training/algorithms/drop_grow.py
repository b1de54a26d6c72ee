"""What the rules that drop and grow have in common: when they are due, how much moves, and the exchange itself."""

from __future__ import annotations

import math
from fractions import Fraction
from numbers import Real

import torch
from torch import Tensor

from resu.core.counting import top_k_mask
from resu.core.pattern import Block, Channel
from resu.training.algorithms.base import Algorithm, View

__all__ = [
    "check_fraction",
    "check_init",
    "drop_and_grow",
    "drop_fraction",
    "finite_growth",
    "initial_scores",
    "kept_through",
    "moved_count",
    "moves_at",
    "random_scores",
    "standing_scores",
    "without_exchange",
]


def check_init(init: str) -> None:
    """Raise ``ValueError`` unless it is ``"random"`` or ``"magnitude"``."""
    if init not in ("random", "magnitude"):
        raise ValueError(f"init must be 'random' or 'magnitude', got {init!r}")


def check_fraction(value: float, name: str) -> None:
    """Raise unless it is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number in [0, 1], got {value!r} of type {type(value).__name__}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value!r}")


def moves_at(rule: Algorithm, step: int) -> bool:
    """Whether a rule that starts sparse is due: at 0 (the first mask), then every interval before ``end_step``."""
    if step == 0:
        return True
    inside = step >= max(1, rule.begin_step) and (rule.end_step is None or step < rule.end_step)
    return inside and (step - rule.begin_step) % rule.interval == 0


def drop_fraction(alpha: float, step: int, end_step: int | None) -> float:
    """``α/2 · (1 + cos(π t / T_end))``, 0 from ``T_end`` on (Evci et al., arXiv 1911.11134, eq. 1); α without an end.

    Example:
        >>> drop_fraction(0.3, 0, 100), round(drop_fraction(0.3, 50, 100), 12), drop_fraction(0.3, 100, 100)
        (0.3, 0.15, 0.0)
    """
    if end_step is None:
        return alpha
    if step >= end_step:
        return 0.0
    return round(alpha / 2 * (1 + math.cos(math.pi * step / end_step)), 12)


def random_scores(view: View) -> Tensor:
    """Uniform numbers in (0, 1): their k largest are k positions drawn without replacement.

    Drawn in float64 on the CPU: no ties in practice, and the same on every device.
    """
    draw = torch.rand(view.weight.shape, generator=view.generator, dtype=torch.float64)
    return draw.to(view.weight.device)


def initial_scores(view: View, init: str) -> Tensor:
    """What the first mask is chosen by."""
    return view.weight.abs() if init == "magnitude" else random_scores(view)


def standing_scores(view: View, init: str) -> Tensor:
    """|w| at active positions and -1 at the others; before the first step, what the first mask is chosen by."""
    if view.step == 0:
        return initial_scores(view, init)
    return view.weight.abs().masked_fill(view.mask.logical_not(), -1.0)


def without_exchange(view: View) -> Tensor:
    """The mask where an update has no gradient to go by: the largest |w| of the active weights, as many as are kept.

    So a layer that had no part in the loss of a step (an expert without tokens, a frozen one) keeps its mask, and
    ``prune_to`` prunes by magnitude.

    Raises:
        ValueError: If more positions are to be active than are: nothing says where to grow.
    """
    active = int(torch.count_nonzero(view.mask))
    if active == view.keep:
        return view.mask
    if active < view.keep:
        raise ValueError(
            f"{view.name!r} has {active} active weights and shall have {view.keep}; no gradient says where to grow: "
            "the weight must be used in the loss of the step before, and prune_to() can only prune"
        )
    size = view.weight.abs()
    return drop_and_grow(view, size, size, view.keep)


def finite_growth(growth: Tensor) -> Tensor:
    """A wish to grow that ranks below infinity, also where units of weights are summed up.

    A gradient that overflowed at a pruned position is no less wanted than any other, but must not oust a weight that
    stays; NaN is wanted least. (No ``GradScaler`` sees what is masked, so it cannot skip such a step.)
    """
    wide = growth.double() if not growth.is_floating_point() else growth
    wide = wide.float() if wide.dtype in (torch.float16, torch.bfloat16) else wide
    largest = torch.finfo(wide.dtype).max / max(1, wide.numel())
    return wide.nan_to_num(nan=-largest).clamp(-largest, largest)


def drop_and_grow(view: View, rank: Tensor, growth: Tensor, survive: int) -> Tensor:
    """Keep the ``survive`` active positions of highest ``rank``, then fill up to ``view.keep`` by ``growth``.

    What is grown is chosen among all positions that were not kept, the ones just dropped among them (as in the
    reference code of RigL): such a position stays as it was, with its value. Single weights are dropped over the whole
    layer and grown where the pattern has room (in their row, in their group); blocks and channels are dropped and grown
    whole, those that ``survive`` positions fill staying (rounded down, at least one).

    Args:
        view: The layer; ``view.keep`` positions are active afterwards, as the pattern can count them.
        rank: Importance of active positions, not negative (what it says elsewhere does not matter).
        growth: Wish to grow, at every position.
        survive: How many active positions stay, at most ``view.keep``.

    Returns:
        The new mask.
    """
    # -1 and not -inf: the mean of a block must stay a number.
    standing = rank.masked_fill(view.mask.logical_not(), -1.0)
    inside, active = view.mask, int(torch.count_nonzero(view.mask))
    whole = isinstance(view.pattern, (Block, Channel))
    if whole:
        inside = view.pattern.select(standing, survive) & view.mask if survive else torch.zeros_like(view.mask)
    else:
        if active > view.keep:  # prune to what the pattern has room for, before anything is exchanged
            inside = view.pattern.select(standing, view.keep) & view.mask
            standing = standing.masked_fill(inside.logical_not(), -1.0)
            active = int(torch.count_nonzero(inside))
        inside = top_k_mask(standing, min(survive, active))
    return view.pattern.select(finite_growth(growth).masked_fill(inside, torch.inf), view.keep)


def moved_count(fraction: float, count: int) -> int:
    """``floor(fraction · count)``, the fraction read as the decimal that was written: 0.29 of 100 is 29, not 28.

    Example:
        >>> moved_count(0.29, 100), moved_count(0.3, 7), moved_count(1.0, 7)
        (29, 2, 7)
    """
    return math.floor(Fraction(str(fraction)) * count)


def kept_through(fraction: float, keep: int) -> int:
    """How many of ``keep`` weights stay where ``floor(fraction · keep)`` are dropped."""
    return keep - moved_count(fraction, keep)
