"""Which units stay: exact counts, from scores, for one sparsity or for a target that is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from resu.core.counting import keep_count, pruned_count, top_k_mask
from resu.pruning.allocation import match_sparsities
from resu.pruning.structured.groups import Group

__all__ = ["group_sparsities", "keep_masks"]


def group_sparsities(groups: Mapping[str, Group], sparsity: Mapping[str, float]) -> dict[str, float]:
    """The sparsity of each group from ``{glob: sparsity}`` over its layers; groups not wholly named are left out.

    Layers of one group can have one sparsity only: it is the lowest that they are given.

    Raises:
        ValueError: If a glob matches no layer, or no group is named wholly.
    """
    layers = [f"{maker}.weight" for group in groups.values() for maker in group.makers]
    given = match_sparsities(sparsity, layers)
    result = {}
    partly = ""
    for name, group in groups.items():
        mine = [given.get(f"{maker}.weight") for maker in group.makers]
        values = [value for value in mine if value is not None]
        if len(values) == len(mine):
            result[name] = min(values)
        elif values:
            partly = f": {', '.join(group.makers[:8])} go together; name them all"
    if not result:
        raise ValueError(f"{', '.join(map(repr, sparsity))} name no group of layers wholly{partly}")
    return result


def keep_masks(
    groups: Mapping[str, Group],
    scores: Mapping[str, Tensor],
    sparsity: float | Mapping[str, float],
    *,
    scope: str = "local",
    round_to: int = 1,
    original: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Which units of each group stay.

    Args:
        groups: What competes.
        scores: Of :func:`resu.pruning.structured.scores.unit_scores`.
        sparsity: Fraction of units removed; or by group name, where groups not named stay whole.
        scope: ``"local"``: of each group. ``"global"``: of all together, each score taken relative to the mean of its
            group, without which groups of large layers would never lose any; each keeps one unit.
        round_to: Channels left are a multiple of this, rounded up; units wider than one index (heads) are not rounded.
        original: Units of each group to count the sparsity of, where some went earlier; of a group that is named here
            only, all but one did.

    Returns:
        ``{group name: bool per unit}``, True = kept.

    Example:
        >>> group = Group("fc", {("fc.weight", 0): torch.arange(10)[:, None]}, ("fc",))
        >>> keep_masks({"fc": group}, {"fc": torch.arange(10.0)}, 0.5, round_to=8)["fc"].long()
        tensor([0, 0, 1, 1, 1, 1, 1, 1, 1, 1])
    """
    if not groups:
        return {}
    counts = {name: (original or {}).get(name, len(group)) for name, group in groups.items()}
    if isinstance(sparsity, Mapping):
        keeps = {name: keep_count(counts[name], s) for name, s in sparsity.items()}
    elif scope == "local":
        keeps = {name: keep_count(n, sparsity) for name, n in counts.items()}
    else:
        counts = {**(original or {}), **counts}
        earlier = sum(n - len(groups.get(name, (0,))) for name, n in counts.items())
        gone = pruned_count(sum(counts.values()), sparsity) - earlier
        keeps = _global(groups, scores, max(gone, 0))
    result = {}
    for name, keep in keeps.items():
        n = len(groups[name])
        if round_to > 1 and groups[name].width == 1:
            keep = math.ceil(keep / round_to) * round_to
        result[name] = top_k_mask(scores[name], min(max(keep, 1), n))
    return result


def _global(groups: Mapping[str, Group], scores: Mapping[str, Tensor], gone: int) -> dict[str, int]:
    """How many units of each group stay where ``gone`` of all go, the lowest first; the best of each group stays."""
    names = list(groups)
    ranked, owner = [], []
    for k, name in enumerate(names):
        score = scores[name].double()
        relative = score / score.mean().clamp_min(torch.finfo(torch.float64).tiny)
        best = torch.zeros_like(score, dtype=torch.bool)
        best[int(score.argmax())] = True
        ranked.append(relative[~best])
        owner.append(torch.full((len(score) - 1,), k, device="cpu"))
    values, owners = torch.cat(ranked), torch.cat(owner)
    kept = top_k_mask(values, max(len(values) - gone, 0))
    counts = torch.bincount(owners[kept], minlength=len(names)) + 1
    return dict(zip(names, counts.tolist(), strict=True))
