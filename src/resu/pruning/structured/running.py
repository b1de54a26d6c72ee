"""Models run as they are verified: in float64, without gradients, fused kernels or caches; their copies and inputs."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from resu.pruning.statistics import eager
from resu.pruning.structured.outputs import comparable
from resu.pruning.trees import leaves, map_leaves

__all__ = [
    "add_noise",
    "call",
    "cloned",
    "differentiable_outputs",
    "double_copy",
    "in_float64",
    "normal_like",
    "plain_copy",
    "plain_forward",
    "random_like",
]

_WIDER = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64) | {
    torch.complex64: torch.complex128
}


class _Wide(TorchDispatchMode):
    """Whoever converts to float32 on the way gets float64: rounding there would hide, or feign, a difference."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in _WIDER:
            kwargs["dtype"] = _WIDER[kwargs["dtype"]]
        return func(*args, **kwargs)


@contextmanager
def plain_forward() -> Iterator[None]:
    """Inside, models run without gradients, and what is compiled, or fused for attention, as it is written."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(False), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _uncompiled():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Inside, compiled modules run as they are written: each copy would be compiled anew."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the compiler takes seconds to import
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


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
    copied: nn.Module = plain_copy(model)._apply(_widened)
    return copied.eval()


def _widened(tensor: Tensor) -> Tensor:
    return (
        tensor.to(torch.complex128)
        if tensor.is_complex()
        else tensor.double()
        if tensor.is_floating_point()
        else tensor
    )


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy without gradients.

    Raises:
        TypeError: If the model cannot be copied.
    """
    # Tensors that a forward pass left in attributes (weight norm does, and whoever keeps features) cannot be copied.
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            for _, leaf in leaves(value):
                if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                    memo[id(leaf)] = leaf.detach().clone()
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise TypeError(f"{type(model).__name__} cannot be copied, so nothing can be tried out: {error}") from error
    for parameter in copied.parameters():
        parameter.grad = None
    return copied


def random_like(inputs: Any, generator: torch.Generator | None) -> Any:
    """Inputs in float64 (complex128): numbers drawn anew (as given where ``generator`` is None), all else as given.

    Where none is negative they are drawn from their own range: a model may take logarithms. Masks stay as given: zeros
    and ones, or what holds infinities.
    """

    def drawn(_: object, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            return leaf
        wide = _widened(leaf.detach())
        if generator is None or not bool(torch.isfinite(wide).all()):
            return wide
        if wide.is_complex() or not wide.numel() or float(wide.min()) < 0 or bool((wide == wide.reshape(-1)[0]).all()):
            return normal_like(wide, generator)
        if bool(((wide == 0) | (wide == 1)).all()):
            return wide
        low, high = wide.min(), wide.max()
        return low + (high - low) * torch.rand(wide.shape, dtype=wide.dtype, generator=generator, device="cpu").to(
            wide.device
        )

    return map_leaves(drawn, inputs)


def normal_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers of a tensor's shape and dtype, on its device: drawn on the CPU, where the generator is."""
    return torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator, device="cpu").to(tensor.device)


@torch.no_grad()
def add_noise(model: nn.Module, generator: torch.Generator, share: float = 0.1) -> None:
    """Noise on all parameters, in place: this share of each one's size, or of 1 where it is zero."""
    for parameter in model.parameters():
        if (parameter.is_floating_point() or parameter.is_complex()) and parameter.numel():
            size = float(parameter.abs().square().mean().sqrt()) or 1.0
            parameter.add_(normal_like(parameter, generator), alpha=share * size)


def differentiable_outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Outputs of a model in float64, with gradients where it lets them through."""
    with in_float64(), torch.enable_grad(), eager(model):
        return [out for out in comparable(call(model, inputs)) if out.requires_grad]


def cloned(inputs: Any) -> Any:
    """Inputs whose tensors a model may write into."""
    return map_leaves(lambda _, leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)
