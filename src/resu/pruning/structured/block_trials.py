"""Whether a module gives its input back once it is zeroed, and what else may hang on it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from resu.pruning.statistics import eager, undisturbed
from resu.pruning.structured.outputs import difference
from resu.pruning.structured.running import call, cloned, differentiable_outputs, in_float64, normal_like
from resu.pruning.structured.slots import slots
from resu.pruning.structured.trace import check_runs
from resu.pruning.structured.training import seeded
from resu.pruning.trees import map_leaves

__all__ = ["Call", "calls_of", "changed_kinds", "hindrance", "passes_on", "untrainable"]

Call = tuple[tuple[Any, ...], dict[str, Any]]
_LARGE = 1e3  # a clamp after the sum shows itself on large inputs only
_GRADIENTS = 1e-6  # largest difference of gradients, over the largest
# Whole numbers that may well rise by one from a block to the next, and are no count of blocks.
_GEOMETRY = {"dilation", "stride", "padding", "kernel", "size", "width", "dim", "channels", "rate", "rank", "expansion"}
_DERIVED = ("torch.nn.utils.", "transformers.")  # their hooks make weights, or note outputs down: no one misses them


def calls_of(model: nn.Module, inputs: Any) -> dict[str, list[Call]]:
    """How each module with parameters was called, where all its calls give a tensor of the first argument's shape.

    Args:
        model: In float64.
        inputs: In float64; run as they are, and a thousand times as large if the model bears that.
    """
    found: dict[str, list[Call]] = {}
    odd: set[str] = set()

    def before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.setdefault(name, []).append((_copied(args), _copied(kwargs)))  # before it can work in place

    def after(name: str, args: tuple[Any, ...], output: Any) -> None:
        kept = found[name][-1][0]
        if not (kept and isinstance(kept[0], Tensor) and isinstance(output, Tensor) and kept[0].shape == output.shape):
            odd.add(name)
            found[name].clear()

    large = map_leaves(lambda _, x: x * _LARGE if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)
    names = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    with _watching(model, names, before, after), in_float64(), eager(model):
        call(model, cloned(inputs))
        with suppress(Exception):  # whatever a model may raise where it checks what it is given
            call(model, large)
    return {name: calls for name, calls in found.items() if name not in odd}


@contextmanager
def _watching(
    model: nn.Module, names: Sequence[str], before: Callable[..., None], after: Callable[..., None]
) -> Iterator[None]:
    hooks = []
    try:
        for name in names:
            module = model.get_submodule(name)
            hooks += [
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: before(name, args, kwargs),
                    with_kwargs=True,
                ),
                module.register_forward_hook(lambda _, args, out, name=name: after(name, args, out)),
            ]
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _copied(tree: Any) -> Any:
    try:
        return copy.deepcopy(tree)
    except Exception:  # locks, generators: nothing that a block would compute with
        return tree


def passes_on(zeroed: nn.Module, calls: Sequence[Call], rtol: float) -> bool:
    """Whether a module gives its first argument back, in the mode that it is in."""
    with seeded(0), in_float64():
        for args, kwargs in calls:
            wanted = args[0]
            if not bool(torch.isfinite(wanted).all()):  # of too large an input
                continue
            try:
                got = zeroed(*_copied(args), **_copied(kwargs))
            except Exception:  # a module may check its weights, or divide by them
                return zeroed.training  # batch norm wants more than one value there: nothing is known then
            off = (got - wanted).abs().max() if wanted.numel() else wanted.sum()
            if not bool(off <= rtol * wanted.abs().max()):
                return False
    return True


def hindrance(model: nn.Module, name: str) -> str | None:
    """Why a block cannot go though it gives its input back; None where nothing is known."""
    block = model.get_submodule(name)
    mine = {id(p) for p in block.parameters()}
    for other, slot in slots(model).items():
        if id(slot.tensor) in mine and not other.startswith(f"{name}."):
            return f"its parameters are also used outside of it, as {other!r}"
    if place := _place(model, name):
        return (
            f"it knows its place among the layers ({place}), by which a cache of keys and values counts, so that "
            "generation would go wrong without it; shrink_transformer(model, depth=...) moves the others up"
        )
    for module in block.modules():
        for kind in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"):
            if any(not _module_of(hook).startswith(_DERIVED) for hook in getattr(module, kind).values()):
                return "hooks hang on it, which would no longer be called; remove them first"
    return None


def _module_of(hook: Any) -> str:
    return str(getattr(hook, "__module__", "")) + "."


def _place(model: nn.Module, name: str) -> str | None:
    """Name of an attribute that says which of the layers beside it this one is."""
    block = model.get_submodule(name)
    parent, _, key = name.rpartition(".")
    beside = {
        int(other): module
        for other, module in model.get_submodule(parent).named_children()
        if key.isdecimal() and other.isdecimal() and type(module) is type(block)
    }
    for path, module in block.named_modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            return "layer_idx"
        for attribute, value in vars(module).items():
            geometry = _GEOMETRY & set(attribute.lower().split("_"))
            if type(value) is int and not geometry and len(beside) > 1 and _counts(beside, path, attribute):
                return str(attribute)
    return None


def _counts(beside: dict[int, nn.Module], path: str, attribute: str) -> bool:
    offsets = set()
    for position, block in beside.items():
        value = vars(dict(block.named_modules()).get(path, nn.Identity())).get(attribute)
        if type(value) is not int:
            return False
        offsets.add(value - position)
    return len(offsets) == 1


def changed_kinds(model: nn.Module, names: Sequence[str], inputs: Any) -> dict[str, str]:
    """``{name: reason}`` of modules whose output is of another dtype, or elsewhere, than what they are given.

    Raises:
        ValueError: If the model does not run on the inputs.
    """
    found: dict[str, str] = {}
    kinds: dict[str, tuple[torch.dtype, torch.device]] = {}

    def before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kinds[name] = args[0].dtype, args[0].device

    def after(name: str, args: tuple[Any, ...], output: Tensor) -> None:
        if (output.dtype, output.device) != kinds[name]:
            was, now = (f"{dtype} on {device}" for dtype, device in (kinds[name], (output.dtype, output.device)))
            found[name] = f"it turns {was} into {now}, which would be missing"

    own = map_leaves(lambda _, x: x.detach().clone() if isinstance(x, Tensor) else x, inputs)
    with undisturbed(model, {}), _watching(model, names, before, after):
        check_runs(model, own)
    return found


def untrainable(masked: nn.Module, small: nn.Module, inputs: Any) -> str | None:
    """Why training would go otherwise without a block than with the block zeroed; None where it would not.

    Without a block what comes after it may write into what is before it, that gradients need. And a block may give its
    input back, but not the gradients, as where it detaches its shortcut or turns their sign.
    """
    wanted = _gradients(masked, inputs)
    if isinstance(wanted, str):
        return None
    got = _gradients(small, inputs)
    if isinstance(got, str):
        return f"it could not be trained without it: {got}"
    names = [name for name in got if bool(torch.isfinite(wanted[name]).all())]
    if not names:
        return None
    # All in one: some gradients are rounding only, as of a bias that a softmax does not see.
    vectors = [torch.cat([grads[name].reshape(-1) for name in names]) for grads in (wanted, got)]
    if difference(vectors[:1], vectors[1:], _GRADIENTS):
        return None
    return "gradients would be others without it: it does not pass them on, as where it detaches its shortcut"


def _gradients(model: nn.Module, inputs: Any) -> dict[str, Tensor] | str:
    """Of a sum of the outputs with random weights, by parameter; or what went wrong."""
    generator = torch.Generator().manual_seed(0)
    try:
        outputs = differentiable_outputs(model, cloned(inputs))
        weights = [normal_like(out, generator) for out in outputs]
        if outputs:
            torch.autograd.backward(outputs, weights)
    except Exception as error:  # whatever a model may raise
        return " ".join(str(error).split())[:200]
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
