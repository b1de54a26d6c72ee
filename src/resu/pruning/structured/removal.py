"""Takes indices out of a model's tensors, with everything that goes with them; and puts them back.

The lowest layer of structured pruning: it is told what to keep, and does not know why, nor whether the result computes
anything. What is decided by looking at a model is checked by :mod:`resu.pruning.structured.verify`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resu.core.sharding import is_sharded
from resu.pruning.structured.attributes import is_direction, recomputed, repaired_attributes, set_attribute
from resu.pruning.structured.optimizers import check_optimizer, exchange, smaller_states
from resu.pruning.structured.slots import Slot, sliced, slots

__all__ = ["Removal", "Slices", "check_undivided", "mask_tensors", "shrink_tensors"]

Slices = Mapping[str, Mapping[int, Tensor]]
"""``{parameter or buffer name: {dimension: indices kept, ascending}}``."""


@dataclass
class Removal:
    """What :func:`shrink_tensors` did, and the way back.

    Attributes:
        attributes: ``{module name: {attribute: new value}}`` of what was repaired.
    """

    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    _back: list[Callable[[], None]] = field(default_factory=list, repr=False)
    _model: nn.Module | None = field(default=None, repr=False)
    _placed: dict[str, nn.Parameter] = field(default_factory=dict, repr=False)

    def undo(self) -> None:
        """Put back the very objects that were there: tensors, attributes, optimizer state. Once only.

        Raises:
            RuntimeError: If something else took the place of a parameter since, or it went; nothing has changed then.

        Example:
            >>> model = nn.Linear(4, 3)
            >>> weight = model.weight
            >>> shrink_tensors(model, {"weight": {0: torch.tensor([0, 2])}, "bias": {0: torch.tensor([0, 2])}}).undo()
            >>> model.weight is weight, model.out_features
            (True, 3)
        """
        now = {} if self._model is None else slots(self._model)
        for name, parameter in self._placed.items():
            if name not in now or now[name].tensor is not parameter:
                raise RuntimeError(
                    f"{name!r} was replaced or taken out since this removal, as a later one does; undo the later one "
                    "first"
                )
        back = self._back[::-1]
        self.forget()
        for step in back:
            step()

    def forget(self) -> None:
        """Let go of what was there before; there is no way back then."""
        self._back.clear()
        self._placed.clear()
        self._model = None

    def close(self, model: nn.Module) -> None:
        """Note the parameters that the model has now: whoever changes one afterwards has to be undone first."""
        self._model = model
        self._placed = {n: slot.tensor for n, slot in slots(model).items() if isinstance(slot.tensor, nn.Parameter)}


@torch.inference_mode(False)
@torch.no_grad()
def shrink_tensors(
    model: nn.Module,
    slices: Slices,
    optimizer: Optimizer | None = None,
    *,
    attributes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Removal:
    """Keep only some indices of a model's tensors, physically and in place.

    Each tensor becomes a new, smaller one under all its names, so that ties stay ties; gradients are cut alike. Sizes
    that layers of ``torch.nn`` note down (``out_channels``, ``in_features``, ``groups``, …) are repaired. In
    ``optimizer`` the new parameter takes the place of the old one in its group, and state of the parameter's shape
    (momenta, second moments) is cut with it; nothing of the old size is held on to but by the result's ``undo``.

    Args:
        model: Any module.
        slices: ``{parameter or buffer name: {dimension: indices kept, ascending}}``; of tied tensors one name will do.
        optimizer: Whose groups and state follow.
        attributes: ``{module name: {attribute: value}}`` to set beside what is repaired.

    Raises:
        KeyError: If the model has no tensor of a name.
        ValueError: If indices are out of range, none is kept, hooks hang on a parameter (masks that are held), a layer
            cannot be smaller in that way, the model is wrapped for several processes, or the optimizer is not of this
            model; nothing has changed then.
        TypeError: If state of the optimizer cannot be cut; nothing has changed then.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> kept = torch.tensor([0, 2])
        >>> _ = shrink_tensors(model, {"0.weight": {0: kept}, "0.bias": {0: kept}, "1.weight": {1: kept}})
        >>> model[0], model[1].in_features
        (Linear(in_features=4, out_features=2, bias=True), 2)
    """
    check_undivided(model)
    check_optimizer(model, optimizer)
    found = slots(model)
    by_tensor: dict[int, tuple[Tensor, list[Slot], dict[int, Tensor]]] = {}
    for name, dims in slices.items():
        if name not in found:
            raise KeyError(f"the model has no parameter or buffer {name!r}")
        tensor = found[name].tensor
        kept = {dim: _checked(name, tensor, dim, indices) for dim, indices in dims.items()}
        entry = by_tensor.setdefault(id(tensor), (tensor, [], {}))
        for dim, indices in kept.items():
            if dim in entry[2] and not torch.equal(entry[2][dim], indices):
                raise ValueError(f"{name!r} is tied to a tensor that is to keep other indices of dimension {dim}")
            entry[2][dim] = indices
    for name, slot in found.items():
        if id(slot.tensor) in by_tensor:
            by_tensor[id(slot.tensor)][1].append(slot)
            _check_hooks(name, slot.tensor)
    # All that can fail is made before anything is put in place.
    new = {key: _smaller(tensor, kept) for key, (tensor, _, kept) in by_tensor.items()}
    states = smaller_states(optimizer, by_tensor)
    wanted = repaired_attributes(model, {s.name: kept for _, where, kept in by_tensor.values() for s in where})
    for module_name, values in (attributes or {}).items():
        wanted.setdefault(module_name, {}).update(values)
    done = Removal(wanted)
    try:
        for key, (tensor, where, _) in by_tensor.items():
            for slot in where:
                slot.put(new[key])
                done._back.append(lambda slot=slot, tensor=tensor: slot.put(tensor))  # type: ignore[misc]
        for module_name, values in wanted.items():
            module = model.get_submodule(module_name)
            for attribute, value in values.items():
                done._back.append(set_attribute(module, attribute, value))
        for slot in (slot for _, where, _ in by_tensor.values() for slot in where):
            done._back.extend(recomputed(slot.module))
        if optimizer is not None:
            exchange(optimizer, by_tensor, new, states, done._back)
    except BaseException:
        done.undo()
        raise
    done.close(model)
    return done


@torch.no_grad()
def mask_tensors(model: nn.Module, slices: Slices) -> None:
    """Zero, in place, all that :func:`shrink_tensors` with these slices would take out: the model it must equal.

    Of a weight in weight norm only the magnitudes are zeroed: a direction of length 0 is none.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> mask_tensors(model, {"weight": {1: torch.tensor([0])}})
        >>> bool((model.weight[:, 1] == 0).all())
        True
    """
    found = slots(model)
    for name, dims in slices.items():
        tensor = found[name].tensor
        for dim, kept in dims.items() if not is_direction(found[name]) else ():
            gone = torch.ones(tensor.shape[dim], dtype=torch.bool, device=tensor.device)
            gone[kept.to(tensor.device)] = False
            tensor.index_fill_(dim, gone.nonzero().view(-1), 0)


def check_undivided(model: nn.Module) -> None:
    """Refuse a model that a wrapper knows the parameters of: it would go on with those that it was made with.

    ``DistributedDataParallel`` would no longer average the gradients of what is new, and say nothing.

    Raises:
        ValueError: If there is such a wrapper, or parameters are divided over processes (FSDP2, tensor parallel).
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            inner = f"{name}.module" if name else "model.module"
            raise ValueError(
                f"{name or 'the model'} is a DistributedDataParallel, which knows the parameters that it was made with "
                f"only; make {inner} smaller in every process, with the same seed, and wrap it anew"
            )
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise ValueError(f"{name!r} is divided over processes; make the model smaller first, then divide it")


def _checked(name: str, tensor: Tensor, dim: int, indices: Tensor) -> Tensor:
    if not 0 <= dim < tensor.ndim:
        raise ValueError(f"{name!r} has {tensor.ndim} dimensions, there is no dimension {dim}")
    indices = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
    n = tensor.shape[dim]
    if indices.ndim != 1 or not indices.numel():
        raise ValueError(f"{name!r} would keep nothing of dimension {dim}; keep at least one of its {n} indices")
    if int(indices[0]) < 0 or int(indices[-1]) >= n or bool((indices.diff() <= 0).any()):
        raise ValueError(f"indices kept of {name!r} must ascend within 0 … {n - 1}, got {indices.tolist()[:8]}")
    return indices


def _check_hooks(name: str, tensor: Tensor) -> None:
    if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
        raise ValueError(
            f"hooks hang on {name!r}, as masks that are held put them there; they are of its size, and would be lost: "
            "release them first (HeldMasks.release(), remove_mask())"
        )


def _smaller(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    value: Tensor = sliced(tensor.detach(), kept)
    if isinstance(tensor, nn.Parameter):
        value = nn.Parameter(value, requires_grad=tensor.requires_grad)
    if tensor.grad is not None:
        value.grad = sliced(tensor.grad, kept)
    value.__dict__.update(tensor.__dict__)  # marks that users put on parameters
    return value
