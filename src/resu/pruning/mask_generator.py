"""From a model and a sparsity to masks: scores, a budget per layer, a pattern."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from resu.core.counting import check_finite
from resu.core.layers import select
from resu.core.pattern import Channel, Pattern, Unstructured, get_pattern
from resu.pruning.allocation import Allocation
from resu.pruning.budget import plan_budget, stack_rows
from resu.pruning.importance import importances
from resu.pruning.importance.layers import scores_of
from resu.pruning.streaming import compute_masks_for_state_dict

__all__ = [
    "MaskGenerator",
    "compute_masks_for_state_dict",
    "compute_random_mask",
    "compute_structured_mask",
    "compute_unstructured_mask",
]


class MaskGenerator:
    """Masks for the prunable weights of a model; the model is not changed.

    Any score goes with any distribution and any pattern, but for what cannot be: an N:M pattern has one sparsity, the
    same in every layer, and so takes neither another one nor a distribution. Blocks and channels are whole: under a
    distribution each layer's count is rounded down to whole ones, at least one, and the total may fall short of
    the budget by less than one of them per layer.

    The layers are those of :func:`resu.core.layers.select`, the output layer among them and stacks of matrices not
    (name those in ``include``); what pruning a whole language model leaves out is
    :func:`resu.pruning.targets.pruning_targets`.

    Args:
        model: Any module.
        sparsity: Fraction removed, in every layer; or ``{glob: sparsity}`` over parameter or module names, where the
            first glob that matches a layer counts and layers matched by none get no mask; None with an N:M pattern.
        method: ``"unstructured"`` (compared where the score says: Wanda within each row, the others within the
            tensor) or a pattern: ``"row"``, ``"tensor"``, ``"2:4"``, ``"block:16x1"``, ``"channel:0"``, a ``Pattern``.
        importance_metric: Name of a registered importance.
        distribution: How one sparsity is divided over layers: ``"uniform"``, ``"er"``, ``"erk"``, ``"global"``,
            ``"lamp"``, ``"owl"`` (exact in total) or a function; None: every layer gets ``sparsity`` itself, rounded
            down.
        include: Globs, as in :func:`resu.core.layers.select`.
        exclude: Globs.
        dataloader: Batches for scores that need inputs or gradients.
        loss_fn: ``loss_fn(model, batch) -> loss``, for scores that need gradients.
        seed: Of random scores.

    Raises:
        TypeError: If a sparsity is no number.
        ValueError: On an unknown name (the known ones are listed), a sparsity outside [0, 1), a glob that
            matches nothing, a combination that cannot be, or missing statistics.

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
        sparsity: float | Mapping[str, float] | None,
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
        self._budget = plan_budget(self.layers, sparsity, self.pattern, distribution, stack_rows(self.layers))

    def generate_masks(self) -> dict[str, Tensor]:
        """``{parameter name: bool mask}``, True = kept, each of the parameter's shape.

        Scores are made and dropped layer by layer, unless the distribution looks at all of them.
        """
        layers = {name: self.layers[name] for name in self._budget.sparsities}
        scores = scores_of(
            self.model,
            layers,
            importances[self.importance_metric],
            self.dataloader,
            loss_fn=self.loss_fn,
            seed=self.seed,
        )
        shapes = {name: layer.matrix(layer.weight).shape for name, layer in layers.items()}
        if self._budget.needs_scores:
            every = dict(scores)
            scores = iter(every.items())
            keeps = self._budget.keeps(shapes, every)
        else:
            keeps = self._budget.keeps(shapes)
        masks = {}
        for name, score in scores:
            check_finite(score, f"scores of {name!r}")
            masks[name] = layers[name].unmatrix(self.pattern.select(score, keeps[name]))
        return masks


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


def compute_structured_mask(
    model: nn.Module,
    sparsity: float | Mapping[str, float],
    dim: int = 0,
    importance_metric: str = "magnitude",
    **options: Any,
) -> dict[str, Tensor]:
    """Masks of whole channels: every slice along ``dim`` is kept or pruned as one, by its mean score.

    Only masks: shapes stay as they are, nothing is removed from the model.

    Args:
        model: Any module.
        sparsity: Fraction of channels removed, rounded down to whole channels, at least one stays; or
            ``{glob: sparsity}``.
        dim: 0: outputs (rows of a linear layer, filters of a convolution); 1: inputs. Counted in ``[out, in…]`` also
            where a weight is stored the other way round (Hugging Face ``Conv1D``, transposed convolutions).
        importance_metric: Name of a registered importance.
        options: Of :class:`MaskGenerator`: ``distribution``, ``include``, ``exclude``, ``dataloader``, ``loss_fn``,
            ``seed``.

    Returns:
        ``{parameter name: bool mask}``, each of the parameter's shape.

    Raises:
        ValueError: If ``dim`` is neither 0 nor 1, and as :class:`MaskGenerator` does.

    Example:
        >>> model = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 5))
        >>> masks = compute_structured_mask(model, 0.5)
        >>> [int(mask.all(dim=1).sum()) for mask in masks.values()]
        [10, 3]
    """
    if dim not in (0, 1) or isinstance(dim, bool):
        raise ValueError(f"dim must be 0 (output channels) or 1 (input channels), got {dim!r}")
    return MaskGenerator(model, sparsity, Channel(dim), importance_metric, **options).generate_masks()


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

    Example:
        >>> compute_random_mask(nn.Linear(10, 20), 0.9, seed=1)["weight"].sum()
        tensor(20)
    """
    return MaskGenerator(model, sparsity, "tensor", "random", seed=seed, **options).generate_masks()
