"""How good a unit is: the scores of all weights coupled in it, added up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from resu.core.counting import check_finite
from resu.core.layers import every_weight, is_conv1d_of_transformers
from resu.pruning.importance import compute_layer_importance, importances
from resu.pruning.structured.groups import Group
from resu.pruning.structured.slots import slots

__all__ = ["NORMS", "unit_scores"]

NORMS = {"l1": 1, "l2": 2}


def unit_scores(
    model: nn.Module,
    groups: Mapping[str, Group],
    importance: str = "l2",
    calibration: Iterable[Any] | None = None,
    *,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A score for each unit of each group, higher = keep.

    Of weights with two dimensions or more: the row that makes a unit and the columns that read it, in all layers
    coupled. ``"l2"`` is the norm of all these weights together, ``"l1"`` the sum of their magnitudes; any other name is
    a registered score, whose values are added up (``"taylor"``: ``Σ |w·g|``; ``"wanda"``: ``Σ |w|·‖x‖``). The sum over
    coupled layers is that of Fang et al., arXiv 2301.12900, eq. 5.

    Args:
        model: The model.
        groups: Of :func:`resu.pruning.structured.groups.find_structure`.
        importance: ``"l1"``, ``"l2"``, or a registered score.
        calibration: Batches, for scores that need data; without them gradients are those that ``backward()`` left.
        loss_fn: ``loss_fn(model, batch) -> loss``, for scores that look at gradients.
        seed: Of random scores.

    Returns:
        ``{group name: [units]}``, float64.

    Raises:
        ValueError: On an unknown score, missing data, NaN, or a group without a weight that the score knows.

    Example:
        >>> from resu.pruning.structured.groups import find_structure
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        >>> with torch.no_grad():
        ...     _ = net[0].weight.copy_(torch.tensor([[3.0, 0.0], [1.0, 1.0]]))
        ...     _ = net[1].weight.copy_(torch.tensor([[0.0, 1.0], [4.0, 1.0]]))
        >>> unit_scores(net, find_structure(net, torch.zeros(1, 2)).groups, "l1")
        {'0': tensor([7., 4.], dtype=torch.float64)}
    """
    known = slots(model)
    names = {name for group in groups.values() for name, _ in group.places if known[name].tensor.ndim > 1}
    if importance in NORMS:
        power = NORMS[importance]
        values = {name: known[name].tensor.detach().abs().double() ** power for name in names}
    else:
        importances[importance]  # unknown names are said before data are run
        values = _registered(model, names, importance, calibration, loss_fn, seed)
    result = {}
    for group_name, group in groups.items():
        total = torch.zeros(len(group), dtype=torch.float64, device="cpu")
        parts = 0
        for (name, dim), indices in group.places.items():
            if name in values:
                value = values[name]
                by_index = value.sum([d for d in range(value.ndim) if d != dim], dtype=torch.float64).cpu()
                total += by_index[indices].sum(1)
                parts += 1
        if not parts:
            raise ValueError(
                f"importance {importance!r} knows no weight of {group_name!r}; use 'l1' or 'l2', or exclude it"
            )
        check_finite(total, f"scores of {group_name!r}")
        result[group_name] = total.sqrt() if importance == "l2" else total
    return result


def _registered(
    model: nn.Module,
    names: set[str],
    importance: str,
    calibration: Iterable[Any] | None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None,
    seed: int,
) -> dict[str, Tensor]:
    """Scores of linear and convolution weights, under the names the structure has for them."""
    wanted = {}
    for name, layer in every_weight(model).items():
        kind = isinstance(layer.module, (nn.Linear, _ConvNd)) or is_conv1d_of_transformers(layer.module)
        mine = next((alias for alias in (name, *layer.ties) if alias in names), None)
        if kind and layer.attribute == "weight" and mine is not None:
            wanted[name] = mine
    if not wanted:
        return {}
    scores = compute_layer_importance(model, importance, calibration, loss_fn=loss_fn, include=list(wanted), seed=seed)
    return {wanted[name]: score for name, score in scores.items()}
