"""One-shot pruning in place, with statistics and a history."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from resu.core.counting import check_sparsity
from resu.core.globs import glob_list
from resu.core.pattern import Pattern, Unstructured, get_pattern
from resu.pruning.allocation import Allocation
from resu.pruning.budget import check_request, stack_rows
from resu.pruning.compression import CompressionStats
from resu.pruning.importance import compute_layer_importance, importances
from resu.pruning.mask_ops import apply_masks_to_model
from resu.pruning.nested import choose_masks
from resu.pruning.pruner import pruners, record
from resu.pruning.targets import pruning_targets

__all__ = ["MagnitudePruner"]


@pruners.register("magnitude")
class MagnitudePruner:
    """Prunes a model in place by the size of its weights, with exact counts.

    Args:
        sparsity: Fraction removed, in [0, 1); or ``{glob: sparsity}`` over parameter or module names; None with an
            N:M pattern: its own.
        scope: ``"local"``: every layer loses ``sparsity`` of its weights. ``"global"``: all layers compete in one
            ranking; the total is exact, and each keeps at least one weight.
        pattern: ``"row"``, ``"2:4"``, ``"block:16x1"``, … or a ``Pattern``; None: single weights, compared where the
            score says (Wanda within each row, the others within the tensor).
        importance: Name of a registered score; scores that need data take ``calibration``.
        include: Globs of what to prune, as in :func:`resu.pruning.targets.pruning_targets`.
        exclude: Globs of what to leave out.
        distribution: How the budget is divided over layers, where neither scope is meant: ``"erk"``, ``"lamp"``, a
            function, … as in :func:`resu.pruning.allocation.allocate`.
        calibration: Batches, for scores that look at inputs or gradients; statistics are of the whole unpruned model
            (:func:`resu.pruning.one_shot.prune_model` goes layer by layer, as large models need it).
        loss_fn: ``loss_fn(model, batch) -> loss``, for scores that look at gradients.
        seed: Of random scores.

    Raises:
        TypeError: If a sparsity is no number.
        ValueError: On an unknown name (the known ones are listed), a sparsity outside [0, 1), or settings that
            contradict each other.

    Example:
        >>> model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
        >>> pruner = MagnitudePruner(0.9, scope="global")
        >>> masks = pruner.prune(model)
        >>> sum(int(mask.sum()) for mask in masks.values()), pruner.history[0]["actual"]
        (30, 0.9)
        >>> round(pruner.stats.ratio("csr"), 2)  # not 10
        2.9
    """

    def __init__(
        self,
        sparsity: float | Mapping[str, float] | None = 0.5,
        scope: str = "local",
        pattern: Pattern | str | None = None,
        importance: str = "magnitude",
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        *,
        distribution: str | Allocation | None = None,
        calibration: Iterable[Any] | None = None,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        if scope not in ("local", "global"):
            raise ValueError(f"scope must be 'local' or 'global', got {scope!r}")
        if scope == "global" and distribution is not None:
            raise ValueError("scope='global' is a distribution itself; give one or the other")
        self.distribution = "global" if scope == "global" else distribution
        scored = importances[importance]
        if pattern is None:
            self.pattern: Pattern = Unstructured("tensor" if scope == "global" else scored.scope)
        else:
            self.pattern = get_pattern(pattern)
        self.sparsity = check_request(sparsity, self.pattern, self.distribution)
        self.scope = scope
        self.importance = importance
        self.include, self.exclude = glob_list(include), glob_list(exclude)
        self.calibration, self.loss_fn, self.seed = calibration, loss_fn, seed
        self.masks: dict[str, Tensor] = {}
        self.skipped: dict[str, str] = {}
        self.history: list[dict[str, Any]] = []
        self._stats: CompressionStats | None = None

    def compute_masks(
        self,
        model: nn.Module,
        sparsity: float | None = None,
        *,
        within: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Masks; the model is not changed, and nothing is remembered.

        Args:
            model: Any module.
            sparsity: In place of the pruner's own; counted over all positions, pruned ones among them.
            within: Masks of before: what they have pruned stays pruned.

        Returns:
            ``{parameter name: bool mask}``, True = kept, of the parameters' shapes.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"a pruner prunes a torch.nn.Module, got {type(model).__name__}")
        wanted = self.sparsity if sparsity is None else check_sparsity(sparsity)
        layers, self.skipped = pruning_targets(model, self.include, self.exclude)
        scores = compute_layer_importance(
            model, self.importance, self.calibration, loss_fn=self.loss_fn, include=list(layers), seed=self.seed
        )
        seen = {name: layers[name].matrix(scores[name]) for name in layers}
        before = {name: layers[name].matrix(mask) for name, mask in (within or {}).items() if name in layers}
        chosen = choose_masks(seen, wanted, self.pattern, self.distribution, before, stack_rows(layers))
        return {name: layers[name].unmatrix(mask) for name, mask in chosen.items()}

    def prune(
        self,
        model: nn.Module,
        sparsity: float | None = None,
        *,
        within: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Prune ``model`` in place: pruned positions are exactly +0.0, the others keep their bits.

        Nothing holds the zeros while the model trains on; :func:`resu.pruning.holding.hold_masks` does.

        Args:
            model: Any module; resurrection layers take the mask and hold it.
            sparsity: In place of the pruner's own.
            within: Masks of before: what they have pruned stays pruned.

        Returns:
            ``{parameter name: bool mask}``, True = kept.

        Raises:
            ValueError: On NaN weights, missing statistics, or a glob that matches nothing; nothing has changed then.
        """
        masks = self.compute_masks(model, sparsity, within=within)
        apply_masks_to_model(model, masks)
        wanted = self.sparsity if sparsity is None else sparsity
        self.history.append(record(masks, self.masks, dict(wanted) if isinstance(wanted, Mapping) else wanted))
        self.masks = masks
        self._stats = CompressionStats.of(masks, model)
        return masks

    @property
    def stats(self) -> CompressionStats:
        """Bytes in each layout after the last :meth:`prune`.

        Raises:
            ValueError: If nothing was pruned yet.
        """
        if self._stats is None:
            raise ValueError("there is nothing to count yet: call prune(model) first")
        return self._stats

    def __repr__(self) -> str:
        return (
            f"MagnitudePruner(sparsity={self.sparsity!r}, scope={self.scope!r}, pattern={self.pattern!r}, "
            f"importance={self.importance!r}, include={self.include!r}, exclude={self.exclude!r}, "
            f"distribution={self.distribution!r}, seed={self.seed})"
        )
