"""Whether a smaller model computes what it should: the model with the same channels zeroed.

*Zeroed* means all that is taken out: a channel's row in the layer that makes it, its bias and its entries in norms,
and its columns in the layers that read it. So what a channel would have held (``sigmoid(0)`` is 0.5) makes no
difference: nothing reads it. Norms over channels, softmax over channels and the like do read it, and are found out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from resu.pruning.statistics import eager
from resu.pruning.structured.outputs import Check, comparable, difference
from resu.pruning.structured.removal import Slices, mask_tensors, shrink_tensors
from resu.pruning.structured.slots import slots
from resu.pruning.trees import leaves, map_leaves

__all__ = [
    "Check",
    "add_noise",
    "call",
    "compare",
    "differentiable_outputs",
    "double_copy",
    "in_float64",
    "plain_copy",
    "plain_forward",
    "random_like",
    "verify_removal",
    "verify_smaller",
]

_ROUNDS = 3  # of two inputs each: at one input alone, half of the channels may be zero behind a ReLU
_NARROW = (torch.float32, torch.float16, torch.bfloat16)


class _Wide(TorchDispatchMode):
    """Whoever converts to float32 on the way gets float64: rounding there would hide, or feign, a difference."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in _NARROW:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@contextmanager
def plain_forward() -> Iterator[None]:
    """Inside, models run without gradients and without fused kernels for attention."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def in_float64() -> Iterator[None]:
    """Inside, models run as with :func:`plain_forward`, and whatever they make on the way is in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with plain_forward(), _Wide():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch.set_default_dtype(before)


def call(model: nn.Module, inputs: Any) -> Any:
    """Run a model on a tensor, a tuple or list of arguments, or a mapping of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def double_copy(model: nn.Module) -> nn.Module:
    """A copy in float64 and evaluation mode, on the model's devices.

    Raises:
        TypeError: If the model cannot be copied.
    """
    return plain_copy(model).double().eval()


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy without gradients.

    Raises:
        TypeError: If the model cannot be copied.
    """
    # Tensors that a forward pass left in attributes (weight norm does) would refuse to be copied.
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise TypeError(f"{type(model).__name__} cannot be copied, so nothing can be tried out: {error}") from error
    for parameter in copied.parameters():
        parameter.grad = None
    return copied


def random_like(inputs: Any, generator: torch.Generator | None) -> Any:
    """Inputs in float64: floats drawn anew (as given where ``generator`` is None), all else as given."""

    def drawn(_: object, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        if generator is None:
            return leaf.detach().double()
        return torch.randn(leaf.shape, dtype=torch.float64, generator=generator).to(leaf.device)

    return map_leaves(drawn, inputs)


def compare(reference: nn.Module, shrunk: nn.Module, inputs: Any, rtol: float = 1e-9) -> Check:
    """Whether two models in float64 (:func:`double_copy`) give the same outputs.

    Args:
        reference: The model with what is removed zeroed.
        shrunk: The smaller model.
        inputs: In float64.
        rtol: As in :func:`resu.pruning.structured.outputs.difference`.

    Raises:
        TypeError: If there is no tensor among the outputs, or the reference does not run.
    """
    own, other = _cloned(inputs), _cloned(inputs)
    before = _versions(reference, own), _versions(shrunk, other)
    with in_float64(), eager(reference), eager(shrunk):
        try:
            wanted = comparable(call(reference, own))
        except Exception as error:
            raise TypeError(
                f"{type(reference).__name__} does not run in float64, so nothing can be verified: "
                f"{' '.join(str(error).split())[:200]}"
            ) from error
        try:
            got = comparable(call(shrunk, other))
        except Exception as error:  # whatever a model may raise that does not fit together any more
            return Check(float("inf"), f"it does not run: {' '.join(str(error).split())[:200]}")
    left_alone = {name for name, version in _versions(reference, own).items() if version == before[0].get(name)}
    for name, version in _versions(shrunk, other).items():
        if version != before[1][name] and name in left_alone:
            return Check(float("inf"), f"it writes into {name} in place, which the masked model leaves alone")
    if not wanted:
        raise TypeError(f"{type(reference).__name__} returns no tensor that could be compared")
    return difference(wanted, got, rtol)


def verify_removal(
    model: nn.Module,
    slices: Slices,
    example_inputs: Any,
    *,
    shrink: Callable[[nn.Module], object] | None = None,
    rtol: float = 1e-9,
    seed: int = 0,
) -> Check:
    """Whether a removal gives the masked model, tried on copies in float64; the model is not changed.

    Compared on the inputs given and on random ones, with the model's weights and twice more with noise added to all of
    them: a branch that starts at zero, as the last norm of a residual block may, would hide what is wrong behind it.

    Args:
        model: The model before the removal.
        slices: What is kept of which tensor, as for :func:`resu.pruning.structured.removal.shrink_tensors`.
        example_inputs: A tensor, a tuple of arguments or a dictionary of keyword arguments.
        shrink: ``shrink(copy)``, which makes a copy smaller in place; None: ``shrink_tensors(copy, slices)``.
        rtol: Largest difference allowed, over the largest output.
        seed: Of the random inputs and the noise; the global generators are left alone.

    Raises:
        TypeError: If the model cannot be copied, or returns no tensor.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> kept = torch.tensor([0, 2])
        >>> good = {"0.weight": {0: kept}, "0.bias": {0: kept}, "2.weight": {1: kept}}
        >>> bool(verify_removal(model, good, torch.ones(1, 4)))
        True
        >>> verify_removal(model, {**good, "2.weight": {1: torch.tensor([0, 1])}}, torch.ones(1, 4)).ok
        False
    """
    return verify_smaller(
        model,
        lambda masked: mask_tensors(masked, slices),
        shrink or (lambda small: shrink_tensors(small, slices)),
        example_inputs,
        rtol=rtol,
        seed=seed,
    )


def verify_smaller(
    model: nn.Module,
    mask: Callable[[nn.Module], object],
    shrink: Callable[[nn.Module], object],
    example_inputs: Any,
    *,
    rtol: float = 1e-9,
    seed: int = 0,
) -> Check:
    """Whether what ``shrink`` makes of a copy equals what ``mask`` makes of one, as :func:`verify_removal` compares.

    Args:
        model: Not changed.
        mask: ``mask(copy)``, which zeroes in place what is to go.
        shrink: ``shrink(copy)``, which takes it out in place.
        example_inputs, rtol, seed: As for :func:`verify_removal`.

    Raises:
        TypeError: If the model cannot be copied, or returns no tensor.
    """
    generator = torch.Generator().manual_seed(seed)
    whole = double_copy(model)
    worst = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for round_ in range(_ROUNDS):
            if round_:
                add_noise(whole, generator)
            masked, small = copy.deepcopy(whole), copy.deepcopy(whole)
            mask(masked)
            try:
                shrink(small)
            except (ValueError, TypeError, KeyError) as error:
                return Check(float("inf"), str(error))
            for source in (generator, generator if round_ else None):
                check = compare(masked, small, random_like(example_inputs, source), rtol)
                if not check:
                    return check
                worst = max(worst, check.error)
    return Check(worst)


@torch.no_grad()
def add_noise(model: nn.Module, generator: torch.Generator, share: float = 0.1) -> None:
    """Noise on all parameters, in place: this share of each one's size, or of 1 where it is zero."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel():
            size = float(parameter.square().mean().sqrt()) or 1.0
            noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            parameter.add_(noise.to(parameter.device), alpha=share * size)


def differentiable_outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Outputs of a model in float64, with gradients where it lets them through."""
    with in_float64(), torch.enable_grad(), eager(model):
        return [out for out in comparable(call(model, inputs)) if out.requires_grad]


def _cloned(inputs: Any) -> Any:
    return map_leaves(lambda _, leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)


def _versions(model: nn.Module, inputs: Any) -> dict[str, int]:
    """How often each parameter, buffer and input was written to, by its name in a message."""
    found = {repr(name): slot.tensor for name, slot in slots(model).items()}
    found |= {f"its input {path}" if path else "its input": leaf for path, leaf in leaves(inputs)}
    return {n: x._version for n, x in found.items() if isinstance(x, Tensor) and not x.is_inference()}
