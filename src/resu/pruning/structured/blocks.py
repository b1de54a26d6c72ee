"""Whole residual blocks: which can go, and their removal.

A block can go where its output is its input once all its parameters are zero: then the model without it *is* the model
with it zeroed. That is seen by trying, not by looking at names or code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from resu.core.globs import glob_list, glob_matches, listing
from resu.pruning.structured.attributes import is_direction
from resu.pruning.structured.block_trials import calls_of, changed_kinds, hindrance, passes_on, untrainable
from resu.pruning.structured.optimizers import check_optimizer
from resu.pruning.structured.removal import Removal, check_undivided
from resu.pruning.structured.running import double_copy, random_like
from resu.pruning.structured.slots import slots
from resu.pruning.structured.trace import check_model
from resu.pruning.structured.verify import Check, verify_smaller

__all__ = ["Blocks", "Skip", "find_blocks", "remove_blocks", "skipped", "zero_blocks"]


class Skip(nn.Module):
    """Stands where a block was removed: gives its first argument back, and takes what else the block was called with.

    Example:
        >>> Skip()(torch.ones(2), mask=None)
        tensor([1., 1.])
    """

    def forward(self, x: Any, /, *args: object, **kwargs: object) -> Any:
        return x


@dataclass(frozen=True)
class Blocks:
    """What :func:`find_blocks` found.

    Attributes:
        names: Modules that can be removed, none inside of another.
        refused: ``{module name: reason}`` of modules that pass their input on once zeroed, and still cannot go.
    """

    names: tuple[str, ...]
    refused: dict[str, str]


def find_blocks(
    model: nn.Module,
    example_inputs: Any,
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    rtol: float = 1e-9,
    seed: int = 0,
) -> Blocks:
    """Modules whose output is their input once their parameters are zero, tried on copies in float64.

    Residual blocks whose shortcut is the identity are, also with a ReLU after the sum where what comes in is positive;
    blocks that change the shape, and post-norm blocks (a norm after the sum), are not. Where one lies inside of
    another, the inner one is meant, if it has more than vectors; ``include`` can name the outer one. All are then tried
    in the whole model, with noise on all weights too, and their gradients; what is not right there is refused.

    Args:
        model: Not changed.
        example_inputs: A tensor, a tuple of arguments or a dictionary of keyword arguments.
        include: Globs over module names; None: all.
        exclude: Globs over module names.
        rtol: Largest difference, over the largest value.
        seed: Of the random inputs and the noise.

    Raises:
        TypeError: If it is no module, a script, quantized, cannot be copied, or returns no tensor.
        ValueError: If a glob of ``include`` matches no module, or the model does not run on the inputs.

    Example:
        >>> class Residual(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.inner = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
        ...
        ...     def forward(self, x):
        ...         return x + self.inner(x)
        >>> find_blocks(nn.Sequential(nn.Linear(3, 4), Residual(), Residual()), torch.zeros(1, 3)).names
        ('1', '2')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"blocks are found in a torch.nn.Module, got {type(model).__name__}")
    check_model(model)
    wanted, unwanted = glob_list(include), glob_list(exclude) or []
    names = [name for name, _ in model.named_modules() if name]
    for glob in wanted or ():
        if not any(_named(name, [glob]) for name in names):
            raise ValueError(f"include {glob!r} matches no module; there are {listing(names)}")
    whole = double_copy(model)
    inputs = random_like(example_inputs, torch.Generator().manual_seed(seed))
    # First, since it says so where the model does not run at all.
    changed_kinds(model, [], example_inputs)
    found, refused = [], {}
    for name, calls in calls_of(whole, inputs).items():
        if name.endswith("._orig_mod"):  # the compiled module around it would go on to call it
            continue
        if (wanted is not None and not _named(name, wanted)) or _named(name, unwanted):
            continue
        zeroed = copy.deepcopy(whole.get_submodule(name))
        zero_blocks(zeroed, [""])
        if passes_on(zeroed, calls, rtol):
            found.append(name)
            if not passes_on(zeroed.train(), calls, rtol):
                refused[name] = "in training it does not give its input back, as with a dropout on its shortcut"
    matrices = [name for name in found if _has_matrix(model.get_submodule(name))]
    # What has vectors only is a part of a block (a scale), if it is inside of one.
    found = [name for name in found if name in matrices or not any(_inside(name, outer) for outer in matrices)]
    inner = [name for name in found if not any(_inside(other, name) for other in found)]
    refused = {name: why for name, why in refused.items() if name in inner}
    kinds = changed_kinds(model, inner, example_inputs)
    for name in inner:
        if name not in refused and (reason := hindrance(model, name) or kinds.get(name)):
            refused[name] = reason
    inner = [name for name in inner if name not in refused]

    def check(names: Sequence[str]) -> Check:
        outcome = verify_smaller(
            model,
            lambda masked: zero_blocks(masked, names),
            lambda small: remove_blocks(small, names),
            example_inputs,
            rtol=rtol,
            seed=seed,
        )
        if not outcome:
            return outcome
        masked, small = copy.deepcopy(whole), copy.deepcopy(whole)
        zero_blocks(masked, names)
        remove_blocks(small, names)
        reason = untrainable(masked, small, inputs)
        return Check(float("inf"), reason) if reason else outcome

    if not inner or check(inner):
        return Blocks(tuple(inner), refused)
    usable: list[str] = []
    for name in inner:
        outcome = check([name])
        if outcome and usable:
            outcome = check([*usable, name])
        if outcome:
            usable.append(name)
        else:
            refused[name] = outcome.reason
    return Blocks(tuple(usable), refused)


@torch.no_grad()
def zero_blocks(model: nn.Module, names: Collection[str]) -> None:
    """Zero, in place, all parameters of these modules; of a weight in weight norm the magnitude only.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> zero_blocks(model, ["1"])
        >>> bool((model[1].weight == 0).all()), bool((model[0].weight == 0).all())
        (True, False)
    """
    for name in names:
        for slot in slots(model.get_submodule(name)).values():
            if isinstance(slot.tensor, nn.Parameter) and not is_direction(slot):
                slot.tensor.zero_()


def remove_blocks(model: nn.Module, names: Collection[str], optimizer: Optimizer | None = None) -> Removal:
    """Put a :class:`Skip` in the place of each of these modules; nothing is verified.

    Args:
        model: Changed in place.
        names: Modules, none inside of another.
        optimizer: Forgets their parameters and their state.

    Returns:
        The way back.

    Raises:
        AttributeError: If the model has no module of a name.
        TypeError: If the optimizer is an LBFGS with a state, which is one vector for all parameters; or names is one.
        ValueError: If the optimizer is not of this model, or the model is wrapped for several processes.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> removal = remove_blocks(model, ["1"])
        >>> model[1], removal.undo(), model[1]
        (Skip(), None, Linear(in_features=2, out_features=2, bias=True))
    """
    if isinstance(names, str):
        raise TypeError(f"names is a list of module names, got {names!r} alone; pass [{names!r}]")
    check_undivided(model)
    check_optimizer(model, optimizer)
    modules = {name: model.get_submodule(name) for name in names}
    gone = {id(p) for module in modules.values() for p in module.parameters()}
    done = Removal()
    try:
        for name, module in modules.items():
            done._back.append(_exchange(model, name, module))
        if optimizer is not None:
            _forget(optimizer, gone, done._back)
    except BaseException:
        done.undo()
        raise
    done.close(model)
    return done


def skipped(model: nn.Module) -> list[str]:
    """Names of what :func:`remove_blocks` removed."""
    return [name for name, module in model.named_modules() if isinstance(module, Skip)]


def _named(name: str, globs: Collection[str]) -> bool:
    return any(glob_matches(glob, f"{name}.weight") for glob in globs)


def _inside(name: str, outer: str) -> bool:
    return name.startswith(f"{outer}.")


def _has_matrix(module: nn.Module) -> bool:
    return any(sum(n > 1 for n in p.shape) > 1 for p in module.parameters())


def _exchange(model: nn.Module, name: str, module: nn.Module) -> Callable[[], None]:
    """Put a :class:`Skip` in the place of a module; what is returned puts the module back."""
    skip, training = Skip().train(module.training), module.training
    model.set_submodule(name, skip)

    def back() -> None:
        if skip.training != training:  # train() and eval() did not reach the module meanwhile
            module.train(skip.training)
        model.set_submodule(name, module)

    return back


def _forget(optimizer: Optimizer, gone: Collection[int], back: list[Callable[[], None]]) -> None:
    for group in optimizer.param_groups:
        before = list(group["params"])
        stay = [id(p) not in gone for p in before]
        for key in ("params", "param_names"):  # the latter where the optimizer was given named_parameters()
            if key in group:
                held = group[key]
                back.append(lambda held=held, whole=list(held): held.__setitem__(slice(None), whole))  # type: ignore[misc]
                held[:] = [entry for entry, stays in zip(held, stay, strict=True) if stays]  # others may hold the list
    for parameter in [p for p in optimizer.state if id(p) in gone]:
        state = optimizer.state.pop(parameter)
        back.append(lambda p=parameter, state=state: optimizer.state.__setitem__(p, state))  # type: ignore[misc]
