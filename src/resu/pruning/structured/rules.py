"""One rule for each operation: what its result's labels are, and what they tie or fix.

An operation without a rule is not guessed at: all that enters it is fixed, and it is named in the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resu.core.registry import Registry
from resu.pruning.structured.flow import apart, merge
from resu.pruning.trees import leaves

if TYPE_CHECKING:
    from resu.pruning.structured.trace import Watcher

__all__ = ["apply_rule", "elementwise", "fixed_along", "put", "rule", "rules"]

Rule = Callable[..., Any]
rules: Registry[Rule] = Registry("operation")

# Elementwise, but not marked so by torch.
_ELEMENTWISE = """
    add sub mul div rsub where masked_fill clone copy _to_copy alias detach lift_fresh _conj native_dropout dropout
    bernoulli zeros_like ones_like full_like empty_like rand_like randn_like fill zero _prelu_kernel hardswish softplus
    threshold relu6 elu celu selu mish log_sigmoid_forward hardtanh leaky_relu rrelu_with_noise clamp clamp_min
    clamp_max isnan isinf nan_to_num
"""
_SHAPE_ONLY = {"zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "fill", "zero"}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Decorator: the rule ``(watcher, func, args, kwargs, out) -> None`` of these operations of ATen."""

    def add(function: Rule) -> Rule:
        for name in names:
            rules.register(name)(function)
        return function

    return add


def apply_rule(watcher: Watcher, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Follow one operation."""
    name = func.overloadpacket.__name__
    if name.startswith("new_"):  # a tensor of a size that was written down
        return
    name = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    given = [x for _, x in leaves((args, kwargs)) if isinstance(x, Tensor)]
    labelled = [x for x in given if watcher.labels_of(x)]  # each is to be looked at, for uses around parameters
    if not labelled:
        return
    try:
        if name in rules:
            rules[name](watcher, func, args, kwargs, out)
        elif name in _ELEMENTWISE.split() or torch.Tag.pointwise in func.tags:
            elementwise(watcher, name, given, out)
        else:
            watcher.fix(labelled, f"no rule for the operation {name!r}, at {watcher.place}")
    except Exception as error:  # tensors that are not what they seem, as inside of vmap
        watcher.fix(labelled, f"the operation {name!r} cannot be followed, at {watcher.place} ({str(error)[:100]})")


def elementwise(watcher: Watcher, name: str, given: list[Tensor], out: Any) -> None:
    """Operands are united where they meet; a result that is written into the first keeps to its shape."""
    if name in _SHAPE_ONLY:
        given = given[:1]
    operands = [watcher.operand(x) for x in given]
    labels = merge(watcher.units, operands, f"{name} at {watcher.place}")
    for _, leaf in leaves(out):
        if isinstance(leaf, Tensor) and leaf.ndim:
            put(watcher, leaf, labels)


def put(watcher: Watcher, tensor: Tensor, labels: list[Tensor]) -> None:
    """Note a result's components down, with as many dimensions as it has."""
    result = []
    for c in labels:
        if c.ndim < tensor.ndim:
            c = c.reshape((1,) * (tensor.ndim - c.ndim) + tuple(c.shape))
        result.append(c)
    watcher.put(tensor, result)


def fixed_along(watcher: Watcher, labels: list[Tensor], dims: Sequence[int], why: str) -> list[Tensor]:
    """Fix components along ``dims``; the others. Fixed ones may flow on: the reason then reaches whatever they meet."""
    inside, others = apart(watcher.units, labels, dims)
    for c in inside:
        watcher.units.fix(c, f"{why}, at {watcher.place}")
    return others
