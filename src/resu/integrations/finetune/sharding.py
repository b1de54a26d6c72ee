"""A prepared model divided over processes by FSDP2 while it trains, and made whole again.

Parameters lie in parts, and so do their gradients and optimizer state; masks act on the part of the weight that is
here. Buffers (codes, scales, mask bits) stay whole in each process.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from resu.core.enforcement import Constraint, constraints_on
from resu.core.mask import SparseMask
from resu.core.sharding import is_sharded, part_of, whole
from resu.integrations.finetune.prepared import Prepared

__all__ = ["Sharding", "shard"]


class Sharding:
    """What :func:`shard` has changed in a model, until :meth:`gather` changes it back."""

    def __init__(self, prepared: Prepared, before: list[_Before], constraints: list[Constraint]) -> None:
        self._prepared, self._before, self._constraints = prepared, before, constraints

    def gather(self) -> None:
        """Make the model whole and plain again, on the CPU of each process; all of them must call it.

        Gradients are gone afterwards, and an optimizer over the parts holds nothing of the model any more.
        """
        model = self._prepared.model
        for constraint in self._constraints:
            constraint.remove()
        self._prepared.constraints.clear()
        found: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, part in module._parameters.items():
                if part is None or not is_sharded(part):
                    continue
                if id(part) not in found:  # tied weights stay one
                    found[id(part)] = nn.Parameter(whole(part).to("cpu"), requires_grad=part.requires_grad)
                module._parameters[name] = found[id(part)]
        for one in self._before:
            one.restore()
        model.to("cpu")  # buffers, and what layers derive from them


class _Before:
    """Class and hooks of a module as they were, for FSDP2 has no way back of its own."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._class = module, type(module)
        self._hooks = {name: dict(value) for name, value in vars(module).items() if _are_hooks(name, value)}
        self._names = set(vars(module))
        self._added: set[str] = set()

    def note(self) -> None:
        """Remember which attributes have come since."""
        self._added = set(vars(self._module)) - self._names

    def restore(self) -> None:
        self._module.__class__ = self._class
        for name, hooks in self._hooks.items():
            held = vars(self._module)[name]
            held.clear()
            held.update(hooks)
        for name in self._added:
            vars(self._module).pop(name, None)


def _are_hooks(name: str, value: Any) -> bool:
    return isinstance(value, dict) and "_hooks" in name


def shard(prepared: Prepared, device: torch.device) -> Sharding:
    """Divide a prepared model, in place, over all processes; each must call it with the same model.

    One block at a time is moved to ``device`` and divided, so that no device holds the whole. θ of layers that move it
    themselves stays whole.

    Args:
        prepared: Its constraints act on parts afterwards.
        device: That of this process.

    Raises:
        ValueError: If what trains within one block is of several dtypes, or a parameter is a scalar.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = prepared.model
    blocks = find_blocks(model)
    _check_dtypes(model, blocks)
    inside = {id(m) for block in blocks for m in block.modules()}
    before = [_Before(module) for module in model.modules()]
    names = {id(p): name for name, p in model.named_parameters()}
    ignored = {layer.theta for layer in prepared.self_updating if layer.theta is not None}
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    held: dict[str, list[Constraint]] = {}
    for block in [*blocks, model]:
        for module in block.modules():
            if block is not model or id(module) not in inside:
                module._apply(lambda t: t.to(device), recurse=False)
        for parameter in block.parameters():
            if id(parameter) in names and (found := constraints_on(parameter)):
                held[names[id(parameter)]] = found
                for constraint in found:
                    constraint.remove()
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
    for one in before:
        one.note()
    parts = dict(model.named_parameters())
    acting = [_on_part(constraint, parts[name]) for name, several in held.items() for constraint in several]
    if prepared.constraints:
        prepared.constraints[:] = acting
    return Sharding(prepared, before, acting)


def _on_part(constraint: Constraint, part: nn.Parameter) -> Constraint:
    mask = SparseMask(part_of(constraint.mask.mask, part))
    return Constraint(part, mask, constraint.kind, constraint.mask_gradient)


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """What is divided and gathered at a time: members of the outermost module lists that share no parameter with
    anything outside (tied weights are gathered together, with the rest).
    """
    lists: list[nn.ModuleList] = []
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in seen:
            lists.append(module)
            seen |= {id(m) for m in module.modules()}
    blocks = {id(block): block for one in lists for block in one}
    owners: dict[int, set[int]] = {}
    within = {id(m): key for key, block in blocks.items() for m in block.modules()}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(within.get(id(module), 0))
    tied = {owner for several in owners.values() if len(several) > 1 for owner in several}
    return [block for key, block in blocks.items() if key not in tied and any(True for _ in block.parameters())]


def _check_dtypes(model: nn.Module, blocks: Iterable[nn.Module]) -> None:
    inside: set[int] = set()
    for block in [*blocks, model]:
        own = [p for p in block.parameters() if id(p) not in inside]
        inside |= {id(p) for p in own}
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in own if p.requires_grad})
        if len(dtypes) > 1:
            raise ValueError(
                f"within {type(block).__name__} parameters of {' and '.join(dtypes)} train, and FSDP2 gathers "
                "gradients of one dtype at a time; give theta-dtype and dtype alike, or let less train beside"
            )
