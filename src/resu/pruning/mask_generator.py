"""From a model and a sparsity to masks: scores, a budget per layer, a pattern."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from resu.core.counting import check_finite, check_sparsity
from resu.core.layers import select
from resu.core.pattern import Pattern, Unstructured, get_pattern
from resu.pruning.allocation import Allocation, allocate, match_sparsities
from resu.pruning.importance import compute_layer_importance, importances

__all__ = ["MaskGenerator", "compute_random_mask", "compute_unstructured_mask"]


class MaskGenerator:
    """Masks for the prunable weights of a model; the model is not changed.

    Args:
        model: Any module.
        sparsity: Fraction removed, in every layer; or ``{glob: sparsity}`` over parameter or module names, where the
            first glob that matches a layer counts and layers matched by none get no mask.
        method: ``"unstructured"`` (compared where the score says: Wanda within each row, the others within the
            tensor) or a pattern: ``"row"``, ``"tensor"``, ``"2:4"``, ``"block:16x1"``, ``"channel:0"``, a ``Pattern``.
        importance_metric: Name of a registered importance.
        distribution: How one sparsity is divided over layers: ``"global"``, ``"erk"``, ``"er"``, ``"uniform"`` (exact
            in total) or a function; None: every layer gets ``sparsity`` itself, rounded down.
        include: Globs, as in :func:`resu.core.layers.select`.
        exclude: Globs.
        dataloader: Batches for scores that need inputs or gradients.
        loss_fn: ``loss_fn(model, batch) -> loss``, for scores that need gradients.
        seed: Of random scores.

    Raises:
        ValueError: On an unknown name (the known ones are listed), a sparsity outside [0, 1), a glob that
            matches nothing, or missing statistics.

    Example:
        >>> model = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 5))
        >>> masks = MaskGenerator(model, sparsity=0.9).generate_masks()
        >>> {name: int(mask.sum()) for name, mask in masks.items()}
        {'0.weight': 20, '1.weight': 10}
        >>> masks = MaskGenerator(model, sparsity={"0": 0.5}, method="row").generate_masks()
        >>> masks["0.weight"].sum(dim=1).unique()
        tensor([5])
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float | Mapping[str, float],
        method: str | Pattern = "unstructured",
        importance_metric: str = "magnitude",
        *,
        distribution: str | Allocation | None = None,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        dataloader: Iterable[Any] | None = None,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.sparsity = sparsity
        self.importance_metric = importance_metric
        self.distribution = distribution
        self.dataloader = dataloader
        self.loss_fn = loss_fn
        self.seed = seed
        self.layers = select(model, include, exclude)
        importance = importances[importance_metric]
        self.pattern = Unstructured(importance.scope) if method == "unstructured" else get_pattern(method)
        if isinstance(sparsity, Mapping):
            if distribution is not None:
                raise ValueError("give either one sparsity with a distribution or a sparsity per layer")
            self._each = match_sparsities(sparsity, self.layers)
        else:
            self._each = dict.fromkeys(self.layers, check_sparsity(sparsity))

    def generate_masks(self) -> dict[str, Tensor]:
        """``{parameter name: bool mask}``, True = kept, each of the parameter's shape."""
        scores = compute_layer_importance(
            self.model,
            self.importance_metric,
            self.dataloader,
            loss_fn=self.loss_fn,
            include=list(self._each),
            seed=self.seed,
        )
        # Patterns see [out, in].
        scores = {n: self.layers[n].matrix(s) for n, s in scores.items()}
        for name, score in scores.items():
            check_finite(score, f"scores of {name!r}")
        shapes = {name: score.shape for name, score in scores.items()}
        if self.distribution is None:
            keeps = {n: self.pattern.keep_for(shapes[n], s) for n, s in self._each.items()}
        else:
            assert not isinstance(self.sparsity, Mapping)
            keeps = allocate(self.distribution, shapes, self.sparsity, scores)
        masks = {n: self.pattern.select(score, keeps[n]) for n, score in scores.items()}
        return {n: self.layers[n].unmatrix(m) for n, m in masks.items()}


def compute_unstructured_mask(
    model: nn.Module,
    sparsity: float | Mapping[str, float],
    importance_metric: str = "magnitude",
    global_pruning: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """Masks of single weights.

    Args:
        model: Any module.
        sparsity: Fraction removed, or ``{glob: sparsity}``.
        importance_metric: Name of a registered importance.
        global_pruning: True: all layers compete in one ranking (each keeps at least one weight).
        **options: Of :class:`MaskGenerator`: ``include``, ``exclude``, ``dataloader``, ``loss_fn``, ``seed``.

    Returns:
        ``{parameter name: bool mask}``.

    Example:
        >>> model = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 5))
        >>> masks = compute_unstructured_mask(model, 0.9, global_pruning=True)
        >>> sum(int(mask.sum()) for mask in masks.values())
        30
    """
    method = "tensor" if global_pruning else "unstructured"
    distribution = "global" if global_pruning else None
    generator = MaskGenerator(model, sparsity, method, importance_metric, distribution=distribution, **options)
    return generator.generate_masks()


def compute_random_mask(
    model: nn.Module, sparsity: float | Mapping[str, float], seed: int = 0, **options: Any
) -> dict[str, Tensor]:
    """Masks that keep an exact number of positions of each layer, chosen at random; equal seeds, equal masks.

    Args:
        model: Any module.
        sparsity: Fraction removed, or ``{glob: sparsity}``.
        seed: Each layer draws from (seed, name).
        **options: Of :class:`MaskGenerator`.

    Returns:
        ``{parameter name: bool mask}``.
    """
    return MaskGenerator(model, sparsity, "tensor", "random", seed=seed, **options).generate_masks()
