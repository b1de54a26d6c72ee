"""Masks that hold while a model trains, under whatever optimizer trains it."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resu.core.enforcement import Constraint, is_held
from resu.core.mask import SparseMask
from resu.core.optimizer_state import clear_state

__all__ = ["HeldMasks", "hold_masks"]


class HeldMasks:
    """Pruned positions of a model that stay exactly +0.0 until :meth:`release`.

    Each weight gets a :class:`resu.core.enforcement.Constraint`: its gradient is zero at pruned positions, and after
    every step of any ``torch.optim.Optimizer`` the positions are zero again. Resurrection layers take the mask and
    hold it themselves. What changes weights in another way (``load_state_dict``, a loop that subtracts gradients by
    hand) is put right by the next step, or by :meth:`enforce`.

    Made by :func:`hold_masks`; as a context manager it lets go at the end.

    Args:
        model: Any module.
        masks: ``{parameter name: bool mask or SparseMask}``, True = kept.

    Raises:
        ValueError: If a name is no parameter of the model, a mask does not fit, or a weight is held already.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor | SparseMask]) -> None:
        self.model = model
        self._constraints: dict[str, Constraint] = {}
        self._layers: dict[str, Any] = {}
        try:
            self.update(masks)
        except BaseException:
            self.release()
            raise

    @property
    def masks(self) -> dict[str, SparseMask]:
        """The present masks by parameter name."""
        held = {name: constraint.mask for name, constraint in self._constraints.items()}
        return held | {name: layer.mask for name, layer in self._layers.items() if layer.mask is not None}

    def update(self, masks: Mapping[str, Tensor | SparseMask], optimizer: Optimizer | None = None) -> None:
        """Hold these masks from now on; newly pruned positions become 0.

        Args:
            masks: For the same weights, or for more of them.
            optimizer: Its state is set to zero at newly pruned positions, if given.

        Raises:
            ValueError: If a weight is held by another already, or a mask does not fit; nothing has changed then.
        """
        parameters, earlier = _parameters(self.model, masks), self.masks
        for name, parameter in parameters.items():
            own = self._constraints.get(name)
            if _own_holder(self.model, name) is None and is_held(parameter, except_for=own):
                raise ValueError(
                    f"{name!r} is held by a mask already; let go of it first: release() on what prune_iteratively, "
                    "GradualPruner or hold_masks gave, commit() on a Sparsifier"
                )
        for name, given in masks.items():
            parameter, before = parameters[name], earlier.get(name)
            mask = (given if isinstance(given, SparseMask) else SparseMask(given)).to(parameter.device)
            layer = _own_holder(self.model, name)
            if layer is not None:
                self._layers[name] = layer
                layer.set_mask(mask)
            else:
                constraint = self._constraints.get(name)
                if constraint is None or constraint.parameter is not parameter:  # replaced since
                    if constraint is not None:
                        constraint.remove()
                    constraint = self._constraints[name] = Constraint(parameter, mask)
                constraint.mask = mask
                constraint.enforce()
            if optimizer is not None:
                gone = mask.mask.logical_not_()
                clear_state(optimizer, parameter, gone if before is None else gone & before.mask.to(gone.device))

    def enforce(self) -> int:
        """Zero the pruned positions now; returns how many values were not zero."""
        strayed, masks = 0, self.masks
        for name, weight in _parameters(self.model, masks).items():
            here = masks[name].to(weight.device)
            strayed += int(torch.count_nonzero(here.get_pruned(weight.detach())))
            here.apply_(weight)  # -0.0 counts as zero and is +0.0 afterwards
        return strayed

    def release(self) -> None:
        """Let go: the zeros stay until something trains them. Resurrection layers keep their masks."""
        for constraint in self._constraints.values():
            constraint.remove()
        self._constraints = {}

    def __enter__(self) -> HeldMasks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def hold_masks(model: nn.Module, masks: Mapping[str, Tensor | SparseMask]) -> HeldMasks:
    """Apply masks and keep them while the model trains; works with any ``torch.optim.Optimizer``.

    Args:
        model: Any module.
        masks: ``{parameter name: bool mask}``, from any pruner.

    Returns:
        The holder: ``release()`` lets go, and so does the end of a ``with`` block.

    Raises:
        ValueError: If a name is no parameter of the model, a mask does not fit, or a weight is held already.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        >>> with hold_masks(model, {"weight": torch.tensor([[True, False]])}):
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> model.weight[0, 1].item()
        0.0
    """
    return HeldMasks(model, masks)


def _parameters(model: nn.Module, masks: Mapping[str, Tensor | SparseMask]) -> dict[str, nn.Parameter]:
    known = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        if name not in known:
            raise ValueError(f"the model has no parameter {name!r}; it has: {', '.join(known) or 'none'}")
        if known[name].shape != mask.shape:
            raise ValueError(f"mask {name!r} has shape {tuple(mask.shape)}, the parameter {tuple(known[name].shape)}")
    return {name: known[name] for name in masks}


def _own_holder(model: nn.Module, name: str) -> Any:
    """The module, where it is one that holds a mask of its own."""
    module_name, _, attribute = name.rpartition(".")
    module: Any = model.get_submodule(module_name)
    return module if attribute == "weight" and callable(getattr(module, "set_mask", None)) else None
