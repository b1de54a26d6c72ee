"""The optimizer's part of a removal: smaller parameters in its groups, its state cut with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resu.pruning.structured.slots import Slot, sliced
from resu.pruning.trees import leaves

__all__ = ["check_optimizer", "exchange", "smaller_states"]

Tied = Mapping[int, tuple[Tensor, list[Slot], dict[int, Tensor]]]
"""``{id of a tensor: (tensor, where it is, {dimension: indices kept})}``."""


def check_optimizer(model: nn.Module, optimizer: Any) -> None:
    """Refuse what is no optimizer of the model: training would go on with parameters that no longer belong to it.

    Raises:
        TypeError: If it has no groups of parameters, or is an LBFGS with a state.
        ValueError: If it holds none of the model's.
    """
    if optimizer is None:
        return
    if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "state"):
        raise TypeError(f"optimizer is one torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, torch.optim.LBFGS) and optimizer.state:
        raise TypeError("LBFGS keeps all parameters in one vector, which cannot be cut; make a fresh one afterwards")
    mine = {id(parameter) for parameter in model.parameters()}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if held and mine and not held & mine:
        raise ValueError(
            f"{type(optimizer).__name__} holds none of the model's parameters: it was made for another model, or "
            "before a removal that it was not passed to; make a fresh one"
        )


def smaller_states(optimizer: Optimizer | None, tied: Tied) -> dict[int, dict[str, Any]]:
    """State of the parameters that are cut, cut with them; by the id of the parameter.

    Raises:
        TypeError: If some of it cannot be cut.
    """
    states: dict[int, dict[str, Any]] = {}
    if optimizer is None:
        return states
    for key, (tensor, where, kept) in tied.items():
        if tensor in optimizer.state:
            states[key] = {
                name: _smaller_state(value, tensor, kept, f"{name!r} of {where[0].name!r}", optimizer)
                for name, value in optimizer.state[tensor].items()
            }
    return states


def _smaller_state(value: Any, tensor: Tensor, kept: Mapping[int, Tensor], what: str, optimizer: Optimizer) -> Any:
    if not isinstance(value, Tensor):
        if any(isinstance(leaf, Tensor) and leaf.numel() > 1 for _, leaf in leaves(value)):
            raise TypeError(
                f"{type(optimizer).__name__} keeps {what} as a {type(value).__name__} of tensors, which cannot be cut; "
                "make a fresh optimizer after the removal"
            )
        return value
    if value.numel() == 1:
        return value
    # Second moments by rows and columns have size 1 in the other dimension (torch.optim.Adafactor).
    fits = value.ndim == tensor.ndim and all(a in (1, b) for a, b in zip(value.shape, tensor.shape, strict=True))
    if fits:
        try:
            return sliced(value, {dim: indices for dim, indices in kept.items() if value.shape[dim] > 1})
        except (RuntimeError, NotImplementedError) as error:
            raise TypeError(f"{type(optimizer).__name__} keeps {what} in a form that cannot be cut: {error}") from error
    raise TypeError(
        f"{type(optimizer).__name__} keeps {what} as {tuple(value.shape)}, which cannot be cut as the parameter's "
        f"{tuple(tensor.shape)} is; make a fresh optimizer after the removal"
    )


def exchange(
    optimizer: Optimizer,
    tied: Tied,
    new: Mapping[int, Tensor],
    states: Mapping[int, dict[str, Any]],
    back: list[Callable[[], None]],
) -> None:
    """Put the smaller parameters and their state in the place of the former ones; ``back`` grows by what leads back."""
    for group in optimizer.param_groups:
        before = list(group["params"])
        group["params"][:] = [new.get(id(p), p) for p in before]  # the same list: others may hold it
        back.append(lambda group=group, before=before: group["params"].__setitem__(slice(None), before))  # type: ignore[misc]
    for key, state in states.items():
        old, fresh = tied[key][0], new[key]
        whole = optimizer.state.pop(old)
        optimizer.state[fresh] = state

        def restore(old: Tensor = old, fresh: Tensor = fresh, whole: Any = whole) -> None:
            optimizer.state.pop(fresh, None)
            optimizer.state[old] = whole

        back.append(restore)
