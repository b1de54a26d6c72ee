"""How many heads, neurons and blocks stay, and which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor

from resu.core.counting import check_sparsity, positions, pruned_count, top_k_mask
from resu.integrations.shrink.families import Site, blocks_of

__all__ = ["Fractions", "choose_blocks", "choose_units", "kept_counts", "without_effect"]


@dataclass(frozen=True)
class Fractions:
    """What is taken away of each block, and how many blocks.

    Attributes:
        heads: Of the heads (with grouped queries: of the key/value heads, each with its query heads), in [0, 1).
        ffn: Of the feed-forward width.
        depth: How many whole blocks.
        round_to: The width that stays is a multiple of it, or whole.
    """

    heads: float | Fraction = 0.0
    ffn: float | Fraction = 0.0
    depth: int = 0
    round_to: int = 1

    def __post_init__(self) -> None:
        for name, value in (("heads", self.heads), ("ffn", self.ffn)):
            if not isinstance(value, Fraction):
                check_sparsity(value, name)
            elif not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {value}; it is the fraction removed")
        if isinstance(self.depth, bool) or not isinstance(self.depth, int) or self.depth < 0:
            raise ValueError(f"depth is the number of blocks to remove, 0 or more; got {self.depth!r}")
        if isinstance(self.round_to, bool) or not isinstance(self.round_to, int) or self.round_to < 1:
            raise ValueError(f"round_to must be a whole number, 1 or more; got {self.round_to!r}")


def kept_counts(sites: Sequence[Site], fractions: Fractions) -> dict[str, int]:
    """How many units of each site stay: all but ``floor(count · fraction)``, a width rounded up to a multiple.

    Example:
        >>> from resu.integrations.shrink.families import Rows
        >>> ffn = Site("mlp", "ffn", 0, 172, Rows("mlp.down_proj", 1), ())
        >>> kept_counts([ffn], Fractions(ffn=0.5)), kept_counts([ffn], Fractions(ffn=0.5, round_to=8))
        ({'mlp': 86}, {'mlp': 88})
    """
    found = {}
    for site in sites:
        if site.kind == "heads":
            found[site.name] = site.count - _pruned(site.count, fractions.heads)
        else:
            kept = site.count - _pruned(site.count, fractions.ffn)
            found[site.name] = min(site.count, math.ceil(kept / fractions.round_to) * fractions.round_to)
    return found


def without_effect(sites: Sequence[Site], fractions: Fractions) -> list[str]:
    """What is asked for and too little to take anything, in words.

    Example:
        >>> from resu.integrations.shrink.families import Rows
        >>> ffn = Site("mlp", "ffn", 0, 172, Rows("mlp.down_proj", 1), ())
        >>> without_effect([ffn], Fractions(ffn=0.01, round_to=8))
        ['ffn 0.01 takes none of 172, as what stays is rounded up to a multiple of 8']
    """
    counts, found = kept_counts(sites, fractions), []
    for kind, fraction in (("heads", fractions.heads), ("ffn", fractions.ffn)):
        here = [site for site in sites if site.kind == kind]
        if fraction and all(counts[site.name] == site.count for site in here):
            most = max(site.count for site in here)
            grouped = kind == "heads" and max(site.queries for site in here) > 1
            unit = f" group{'s' * (most > 1)} of query heads" if grouped else ""
            taken = any(_pruned(site.count, fraction) for site in here)
            why = f", as what stays is rounded up to a multiple of {fractions.round_to}" if taken else ""
            found.append(f"{kind} {fraction} takes none of {most}{unit}{why}")
    return found


def _pruned(count: int, fraction: float | Fraction) -> int:
    return math.floor(count * fraction) if isinstance(fraction, Fraction) else pruned_count(count, fraction)


def choose_units(scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """The units of highest score, ascending; of equal ones the lower index.

    Args:
        scores: ``{site name: [units]}``.
        counts: ``{site name: how many stay}``.

    Example:
        >>> import torch
        >>> choose_units({"mlp": torch.tensor([1.0, 3.0, 1.0, 2.0])}, {"mlp": 3})
        {'mlp': tensor([0, 1, 3])}
    """
    return {name: positions(top_k_mask(scores[name], count)) for name, count in counts.items()}


def choose_blocks(model: Any, influences: Tensor | None, depth: int) -> list[int] | None:
    """The indices of the blocks that stay when the ``depth`` of least influence go; None where all do.

    Args:
        model: The model.
        influences: float64 ``[blocks]``.
        depth: How many go; of equal ones the higher index.

    Raises:
        ValueError: If none would stay, or influences are missing.
    """
    total = len(blocks_of(model))
    if depth == 0:
        return None
    if depth >= total:
        raise ValueError(f"depth {depth} would leave nothing of the {total} blocks; remove at most {total - 1}")
    if influences is None:
        raise ValueError("which blocks go is decided by what they do to data: give a calibration text")
    found: list[int] = positions(top_k_mask(influences, total - depth)).tolist()
    return found
