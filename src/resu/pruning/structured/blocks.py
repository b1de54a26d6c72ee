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
from torch import Tensor, nn
from torch.optim import Optimizer

from resu.core.globs import glob_list, glob_matches, listing
from resu.pruning.structured.attributes import is_direction
from resu.pruning.structured.removal import Removal
from resu.pruning.structured.slots import slots
from resu.pruning.structured.verify import Check, call, double_copy, in_float64, random_like, verify_smaller

__all__ = ["Blocks", "Skip", "find_blocks", "remove_blocks", "skipped", "zero_blocks"]


class Skip(nn.Module):
    """Stands where a block was removed: gives its first argument back, and takes what else the block was called with.

    Example:
        >>> Skip()(torch.ones(2), mask=None)
        tensor([1., 1.])
    """

    def forward(self, x: Any, *args: object, **kwargs: object) -> Any:
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
    another, the inner one is meant; ``include`` can name the outer one. All are then tried in the whole model, with
    noise on all weights too; what is not right there is refused.

    Args:
        model: Not changed.
        example_inputs: A tensor, a tuple of arguments or a dictionary of keyword arguments.
        include: Globs over module names; None: all.
        exclude: Globs over module names.
        rtol: Largest difference, over the largest value.
        seed: Of the random inputs and the noise.

    Raises:
        TypeError: If the model cannot be copied, or returns no tensor.
        ValueError: If a glob of ``include`` matches no module.

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
    wanted, unwanted = glob_list(include), glob_list(exclude) or []
    names = [name for name, _ in model.named_modules() if name]
    for glob in wanted or ():
        if not any(_named(name, [glob]) for name in names):
            raise ValueError(f"include {glob!r} matches no module; there are {listing(names)}")
    whole = double_copy(model)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for name, calls in _calls(whole, random_like(example_inputs, generator)).items():
        if (
            (wanted is None or _named(name, wanted))
            and not _named(name, unwanted)
            and _passes_on(whole, name, calls, rtol)
        ):
            found.append(name)
    inner = [name for name in found if not any(_inside(other, name) for other in found)]
    refused: dict[str, str] = {}
    for name in list(inner):
        if reason := _not_alone(model, name):
            refused[name] = reason
            inner.remove(name)

    def check(names: Sequence[str]) -> Check:
        return verify_smaller(
            model,
            lambda masked: zero_blocks(masked, names),
            lambda small: remove_blocks(small, names),
            example_inputs,
            rtol=rtol,
            seed=seed,
        )

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
        TypeError: If the optimizer is an LBFGS with a state, which is one vector for all parameters.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> removal = remove_blocks(model, ["1"])
        >>> model[1], removal.undo(), model[1]
        (Skip(), None, Linear(in_features=2, out_features=2, bias=True))
    """
    modules = {name: model.get_submodule(name) for name in names}
    gone = {id(p) for module in modules.values() for p in module.parameters()}
    if isinstance(optimizer, torch.optim.LBFGS) and optimizer.state:
        raise TypeError("LBFGS keeps all parameters in one vector, which cannot be cut; make a fresh one afterwards")
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


_Call = tuple[tuple[Any, ...], dict[str, Any]]


def _calls(model: nn.Module, inputs: Any) -> dict[str, list[_Call]]:
    """How each module with parameters was called, where all its calls give a tensor of the first argument's shape."""
    found: dict[str, list[_Call]] = {}
    odd: set[str] = set()
    hooks = []

    def recorder(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.setdefault(name, []).append((copy.deepcopy(args), kwargs))  # before it can work in place

        return hook

    def judge(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            kept = found[name][-1][0]
            if not (
                kept and isinstance(kept[0], Tensor) and isinstance(output, Tensor) and kept[0].shape == output.shape
            ):
                odd.add(name)
                found[name].clear()

        return hook

    for name, module in model.named_modules():
        if name and any(True for _ in module.parameters()):
            hooks.append(module.register_forward_pre_hook(recorder(name), with_kwargs=True))
            hooks.append(module.register_forward_hook(judge(name), with_kwargs=True))
    try:
        with in_float64():
            call(model, inputs)
    finally:
        for handle in hooks:
            handle.remove()
    return {name: calls for name, calls in found.items() if name not in odd}


def _passes_on(model: nn.Module, name: str, calls: Sequence[_Call], rtol: float) -> bool:
    zeroed = copy.deepcopy(model.get_submodule(name))
    zero_blocks(zeroed, [""])
    for args, kwargs in calls:
        wanted = args[0].clone()
        with in_float64():
            got = zeroed(*args, **kwargs)
        off = (got - wanted).abs().max() if wanted.numel() else torch.zeros(())
        if not bool(off <= rtol * wanted.abs().max()):
            return False
    return True


def _named(name: str, globs: Collection[str]) -> bool:
    return any(glob_matches(glob, f"{name}.weight") for glob in globs)


def _inside(name: str, outer: str) -> bool:
    return name.startswith(f"{outer}.")


def _not_alone(model: nn.Module, name: str) -> str | None:
    """Why a block cannot go though it gives its input back; None where nothing is known."""
    block = model.get_submodule(name)
    mine = {id(p) for p in block.parameters()}
    for other, slot in slots(model).items():
        if id(slot.tensor) in mine and not _inside(other, name):
            return f"its parameters are also used outside of it, as {other!r}"
    if any(isinstance(getattr(module, "layer_idx", None), int) for module in block.modules()):
        return (
            "it knows its place among the layers (layer_idx), by which a cache of keys and values counts, so that "
            "generation would go wrong without it; shrink_transformer(model, depth=...) moves the others up"
        )
    return None


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
        group["params"][:] = [p for p in before if id(p) not in gone]  # the same list: others may hold it
        back.append(lambda group=group, before=before: group["params"].__setitem__(slice(None), before))  # type: ignore[misc]
    for parameter in [p for p in optimizer.state if id(p) in gone]:
        state = optimizer.state.pop(parameter)
        back.append(lambda p=parameter, state=state: optimizer.state.__setitem__(p, state))  # type: ignore[misc]
