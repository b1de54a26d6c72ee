"""What each part of a transformer costs when some of it is taken away."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from resu.integrations.shrink.families import blocks_of, sites_of
from resu.integrations.shrink.plan import Fractions, choose_units, kept_counts
from resu.integrations.shrink.removal import masked

__all__ = ["LEVELS", "sensitivity"]

#: Fractions taken away.
LEVELS = (0.1, 0.3, 0.5)
Progress = Callable[[int, int, str], None]


def sensitivity(
    model: Any,
    scores: Mapping[str, Tensor],
    judge: Callable[[Any], float],
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """The quality of a model with a part of one block's heads, or neurons, or with one whole block silenced.

    Args:
        model: As before afterwards.
        scores: Of its units (:func:`resu.integrations.shrink.scores.score_units`).
        judge: ``judge(model)`` is its quality.
        progress: Called with (done, total, what).

    Returns:
        A row per site, heads and neurons of each block, with ``block``, ``kind``, ``count`` and ``values``, a list of
        ``{"removed": fraction, "kept": units, "value": quality}`` (None where a fraction removes nothing), and a row
        per block with the kind ``"block"``.
    """
    sites, depth = sites_of(model), len(blocks_of(model))
    jobs = len(sites) * len(LEVELS) + (depth if depth > 1 else 0)
    done = 0

    def judged(units: Mapping[str, Tensor], blocks: Sequence[int] | None, what: str) -> float:
        nonlocal done
        with masked(model, units, blocks):
            value = judge(model)
        done += 1
        if progress is not None:
            progress(done, jobs, what)
        return value

    rows: list[dict[str, Any]] = []
    for site in sites:
        values: list[dict[str, Any]] = []
        for level in LEVELS:
            kept = kept_counts([site], Fractions(heads=level, ffn=level))[site.name]
            units = choose_units(scores, {site.name: kept})
            value = None if kept == site.count else judged(units, None, f"{site.kind} of block {site.block}")
            values.append({"removed": level, "kept": kept * site.queries, "value": value})
        rows.append({"block": site.block, "kind": site.kind, "count": site.count * site.queries, "values": values})
    if depth > 1:
        for block in range(depth):
            value = judged({}, [index for index in range(depth) if index != block], f"block {block}")
            rows.append({"block": block, "kind": "block", "count": 1, "values": [{"removed": 1.0, "value": value}]})
    return rows
