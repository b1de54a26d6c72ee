"""Plans: everything that decides the masks of a checkpoint, small enough to keep while the weights stream by."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resu.core.counting import check_finite, keep_count
from resu.core.pattern import NM, Pattern, Unstructured, get_pattern
from resu.core.ranks import Ranks
from resu.core.score_keys import has_keys
from resu.core.shards import Shards
from resu.pruning.allocation import Allocation, allocations, needs_scores
from resu.pruning.budget import Budget, plan_budget
from resu.pruning.cut_search import find_cuts
from resu.pruning.cuts import Cut, Reading, spread
from resu.pruning.importance import importances
from resu.pruning.targets import HEADS, state_dict_targets
from resu.pruning.weight_scores import LampScores, Weights, WeightScores, matrix_rows

__all__ = ["MaskPlan", "Masker", "plan_masks"]

RANKED = ("global", "lamp")  # what looks at scores and can do so as they stream by


@dataclass
class Masker:
    """Masks of one layer from its flat weights, chunk after chunk in order.

    Attributes:
        unit: Chunks must hold a multiple of so many weights (the last one may be shorter).
        mask: The function.
    """

    mask: Callable[[Tensor], Tensor]
    unit: int = 1

    def __call__(self, weights: Tensor) -> Tensor:
        return self.mask(weights)


@dataclass(frozen=True)
class MaskPlan:
    """What decides the masks: a cut for each layer, or a count that its pattern fills.

    Attributes:
        scores: The scores of the layers.
        pattern: Which positions compete.
        keeps: ``{layer: kept}``; counts a pattern may round, see :meth:`resu.core.pattern.Pattern.reachable`.
        cuts: ``{layer: Cut}`` where single weights compete over the layer and scores come in chunks; else empty.
        skipped: ``{tensor: why it has no mask}``.
    """

    scores: WeightScores
    pattern: Pattern
    keeps: Mapping[str, int]
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Layers that get a mask, in their order."""
        return list(self.scores.names)

    def masker(self, name: str) -> Masker:
        """What makes the mask of a layer.

        Where scores or the pattern need the whole weight, it is read, and the mask is made, here.
        """
        if name in self.cuts:
            mask = self.cuts[name].masker()
            return Masker(lambda weights: mask(self.scores.of_chunk(weights)))
        shape = self.scores.matrix_shape(name)
        by_rows = isinstance(self.pattern, NM) or self.pattern == Unstructured("row")
        if by_rows and self.scores.local and name not in self.scores.transposed and len(shape) > 1:
            return Masker(self._rows(name, shape), math.prod(shape[1:]))
        whole = self.pattern.select(self.scores.whole(name), self.keeps[name])
        flat, place = self.scores.stored(name, whole).reshape(-1), 0

        def next_part(weights: Tensor) -> Tensor:
            nonlocal place
            place += weights.numel()
            return flat[place - weights.numel() : place]

        return Masker(next_part)

    def _rows(self, name: str, shape: torch.Size) -> Callable[[Tensor], Tensor]:
        each, extra = divmod(self.keeps[name], shape[0])
        row = 0

        def part(weights: Tensor) -> Tensor:
            nonlocal row
            scores = self.scores.of_chunk(weights).view(-1, *shape[1:])
            check_finite(scores, f"scores of {name!r}")
            # Under row scope the first rows keep one more where the count does not divide.
            more = max(0, min(extra - row, len(scores)))
            row += len(scores)
            parts = [(scores[:more], each + 1), (scores[more:], each)]
            return torch.cat([self.pattern.select(s, k * len(s)).reshape(-1) for s, k in parts if len(s)])

        return part

    def state(self) -> dict[str, Any]:
        """The decisions as plain JSON."""
        return {
            "keeps": dict(self.keeps),
            "cuts": {name: dataclasses.asdict(cut) for name, cut in self.cuts.items()},
        }

    def with_state(self, state: Mapping[str, Any]) -> MaskPlan:
        """The same plan with decisions from :meth:`state`."""
        cuts = {name: Cut(**cut) for name, cut in state["cuts"].items()}
        return dataclasses.replace(self, keeps=dict(state["keeps"]), cuts=cuts)


def _chosen(
    weights: Weights,
    shapes: Mapping[str, torch.Size],
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
) -> tuple[list[str], dict[str, str]]:
    """Floating weights among the targets; stored codes and the like have no magnitude of their own."""
    config = _stated(weights)
    classes = config.get("architectures")
    architecture = " ".join(map(str, classes)) if isinstance(classes, list) else ""
    tied = _has_tied_head(architecture, config, shapes)
    names, skipped = state_dict_targets(shapes, include, exclude, tied=tied, architecture=architecture)
    odd = [name for name in names if not has_keys(weights.dtype(name))]
    if odd and include is not None:
        raise ValueError(
            f"{odd[0]!r} has dtype {weights.dtype(odd[0])}; floating weights of 16 bits or more are pruned, "
            "so dequantize it first"
        )
    reasons = {name: f"dtype {str(weights.dtype(name)).removeprefix('torch.')}" for name in odd}
    left = [name for name in names if name not in reasons]
    if not left:
        raise ValueError(
            f"none of the {len(names)} weights is floating with 16 bits or more; dequantize "
            "them first (resu export --to dense does that of pack-quantized)"
        )
    return left, skipped | reasons


def _stated(weights: Weights) -> dict[str, Any]:
    """``config.json`` beside the weights; empty where there is none to read, which those who need more of it say."""
    file = weights.folder / "config.json" if isinstance(weights, Shards) else None
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else {}
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def _has_tied_head(architecture: str, config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether a configuration is that of a model whose output head is its embedding."""
    # A head that is not stored can only be the embedding; configurations often do not say what is the default.
    stored = any(part in HEADS for name in names for part in name.split("."))
    speaks = "CausalLM" in architecture or "LMHead" in architecture
    return speaks and bool(config.get("tie_word_embeddings", not stored))


def plan_masks(
    weights: Weights,
    shapes: Mapping[str, torch.Size],
    sparsity: float | Mapping[str, float] | None,
    method: str = "magnitude",
    *,
    pattern: Pattern | str | None = None,
    distribution: str | Allocation | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    transposed: frozenset[str] = frozenset(),
    seed: int = 0,
    how: Reading | None = None,
    decide: bool = True,
) -> MaskPlan:
    """Decide every mask; see :func:`resu.pruning.streaming.compute_masks_for_state_dict`.

    Args:
        weights: Where weights are read from.
        shapes: ``{name: shape}`` of all tensors.
        sparsity: Fraction removed, or ``{glob: sparsity}``; None: that of an N:M pattern.
        method: Name of a registered importance.
        pattern: A pattern or its name; None: where the score says.
        distribution: How the budget is divided; None: every layer gets ``sparsity``.
        include: Globs.
        exclude: Globs.
        transposed: Weights stored ``[in, out]``.
        seed: Of random scores.
        how: Threads, processes and limits.
        decide: False: check the arguments and leave the counts open, for :meth:`MaskPlan.with_state`.

    Raises:
        ValueError: On a method or distribution that needs more than weights, and as there.
    """
    importance = importances[method]
    if importance.needs:
        raise ValueError(
            f"method {method!r} needs {' and '.join(sorted(importance.needs))}, and a checkpoint alone has none; use "
            "prune_model with calibration data, or a method that looks at weights only: "
            f"{', '.join(name for name in importances if not importances[name].needs)}"
        )
    chosen = Unstructured(importance.scope) if pattern is None else get_pattern(pattern)
    names, skipped = _chosen(weights, shapes, include, exclude)
    rows = {name: matrix_rows(name, shapes[name], name in transposed) for name in names}
    stacks = {name: n for name, n in rows.items() if n is not None}
    budget = plan_budget(names, sparsity, chosen, distribution, stacks)
    if budget.needs_scores and distribution not in RANKED:
        known = [name for name in allocations if name in RANKED or not needs_scores(name)]
        raise ValueError(
            f"distribution {distribution!r} looks at the scores of all layers at once, and those of a checkpoint are "
            f"never in memory together; use one of {', '.join(known)}, or prune_model on a loaded model"
        )
    skipped |= {name: "matched by no glob of sparsity" for name in names if name not in budget.sparsities}
    names = [name for name in names if name in budget.sparsities]
    scores = WeightScores(weights, names, importance, seed, transposed & set(names))
    plan = MaskPlan(scores, chosen, dict.fromkeys(names, 0), {}, skipped)
    return _decided(plan, budget, how or Reading()) if decide else plan


def _decided(plan: MaskPlan, budget: Budget, how: Reading) -> MaskPlan:
    """The plan with its counts and cuts; weights are read where they take that."""
    scores = plan.scores
    in_chunks = plan.pattern == Unstructured("tensor") and scores.local
    shapes = {name: scores.matrix_shape(name) for name in plan.names}
    if not budget.needs_scores:
        keeps = budget.keeps(shapes)
    else:
        assert budget.sparsity is not None
        ranked = scores if budget.distribution == "global" else LampScores(scores)
        cuts = find_cuts(ranked, plan.names, _total(scores.sizes, budget.sparsity), how)
        keeps = {name: plan.pattern.reachable(shapes[name], cut.kept) for name, cut in cuts.items()}
        if in_chunks and ranked is scores:
            return dataclasses.replace(plan, keeps=keeps, cuts=cuts)
    return dataclasses.replace(plan, keeps=keeps, cuts=_cut_each(scores, keeps, how) if in_chunks else {})


def _total(sizes: Mapping[str, int], sparsity: float) -> int:
    keep = keep_count(sum(sizes.values()), sparsity)
    if keep < len(sizes):
        raise ValueError(
            f"sparsity {sparsity!r} keeps {keep} weights, fewer than the {len(sizes)} layers that keep one each"
        )
    return keep


def _cut_each(scores: WeightScores, keeps: Mapping[str, int], how: Reading) -> dict[str, Cut]:
    """A cut per layer, each process for its share of them."""
    alone = dataclasses.replace(how, workers=1, ranks=Ranks(), blocks=min(how.blocks, 256))
    mine = how.ranks.mine({name: scores.sizes[name] for name in keeps})
    found = dict(spread(lambda n: (n, find_cuts(scores, [n], keeps[n], alone)[n]), mine, how.workers))
    table = np.zeros((len(keeps), 3), dtype=np.int64)
    for i, name in enumerate(keeps):
        if name in found:
            table[i] = found[name].key, found[name].ties, found[name].kept
    rows = how.ranks.sum(table).tolist()
    return {name: Cut(*row) for name, row in zip(keeps, rows, strict=True)}
