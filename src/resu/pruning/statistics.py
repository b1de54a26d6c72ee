"""Statistics that scores look at: norms of a layer's inputs, gradients of its weight."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resu.core.counting import check_finite
from resu.core.layers import Layer

__all__ = ["NEEDS", "Stats", "collect"]

NEEDS = frozenset({"inputs", "grads", "hessian"})


@dataclass(frozen=True)
class Stats:
    """What a score may look at beside the weight; only what it declared in ``needs`` is there.

    Attributes:
        grad: Gradient of the loss, mean over batches, ``[out, in…]``.
        grad_squared: Mean over batches of the squared gradient, ``[out, in…]``.
        input_norm: L2 norm of each input over all tokens, float32 (float64 for a float64 model): ``[in]`` for a
            linear layer, ``[in, kh, kw]`` for a convolution, or the weight's shape where rows see different inputs.
        hessian: ``(2/n) Σ x xᵀ``, ``[in, in]``.
        generator: For scores that draw; None: the global one.
    """

    grad: Tensor | None = None
    grad_squared: Tensor | None = None
    input_norm: Tensor | None = None
    hessian: Tensor | None = None
    generator: torch.Generator | None = None


def collect(
    model: nn.Module,
    layers: Mapping[str, Layer],
    batches: Iterable[Any],
    needs: Collection[str] = ("inputs",),
    *,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> dict[str, Stats]:
    """Run ``batches`` through the model and gather what scores need, layer by layer.

    The model runs in evaluation mode and is left as it was: training flags, gradients and hooks, also after
    an error. Input norms are sums of squares in float32 (float64 in float64), so half-precision inputs do not
    overflow. Where a batch is a mapping with an ``attention_mask`` ``[batch, tokens]``, padding tokens do not count.

    Args:
        model: Any module.
        layers: From :func:`resu.core.layers.select`.
        batches: A tensor, a tuple whose first entry is the input, or a mapping of keyword arguments, each; moved
            to the model's device.
        needs: Of ``"inputs"``, ``"grads"``.
        loss_fn: ``loss_fn(model, batch) -> scalar``; needed for ``"grads"``.
        forward: How to run a batch where the default is not right.

    Returns:
        ``{name: Stats}``. Gradients come as scores see the weight (:meth:`resu.core.layers.Layer.matrix`).

    Raises:
        ValueError: Without batches, on an unknown need, a layer type whose inputs are not known, or NaN
            in inputs, loss or gradients.

    Example:
        >>> from resu.core.layers import select
        >>> model = nn.Sequential(nn.Linear(2, 3))
        >>> stats = collect(model, select(model), [torch.tensor([[3.0, 0.0], [4.0, 1.0]])])
        >>> stats["0.weight"].input_norm
        tensor([5., 1.])
    """
    unknown = set(needs) - {"inputs", "grads"}
    if unknown:
        raise ValueError(f"cannot collect {', '.join(sorted(unknown))}; known: inputs, grads")
    grads = "grads" in needs
    if grads and loss_fn is None:
        raise ValueError("gradient statistics need loss_fn(model, batch) -> loss")
    run = forward or _forward
    inputs = {n: _Inputs(n, layer.module) for n, layer in layers.items()} if "inputs" in needs else {}
    slopes = {n: _Gradients() for n in layers} if grads else {}
    count = 0
    with _undisturbed(model, layers if grads else {}), torch.set_grad_enabled(grads):
        handles = [layers[n].module.register_forward_pre_hook(one.see, with_kwargs=True) for n, one in inputs.items()]
        try:
            for batch in batches:
                count += 1
                batch = _to(batch, next((p.device for p in model.parameters()), torch.device("cpu")))
                padding = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                for one in inputs.values():
                    one.padding = padding
                if grads:
                    assert loss_fn is not None
                    _add_gradients(loss_fn(model, batch), layers, slopes)
                else:
                    run(model, batch)
        finally:
            for handle in handles:
                handle.remove()
    if not count:
        raise ValueError("there is no batch to collect statistics from; pass an iterable that can be run again")
    result = {}
    for name, layer in layers.items():
        grad, square = slopes[name].means(count) if grads else (None, None)
        if grad is not None and square is not None:
            grad, square = layer.matrix(grad), layer.matrix(square)
        norm = inputs[name].norm(layer.weight) if inputs else None
        result[name] = Stats(grad=grad, grad_squared=square, input_norm=norm)
    return result


def _forward(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [_to(value, device) for value in batch]
    return batch


@contextmanager
def _undisturbed(model: nn.Module, trained: Mapping[str, Layer]) -> Iterator[None]:
    """Evaluation mode and gradients for ``trained``; everything as before afterwards."""
    flags = {module: module.training for module in model.modules()}
    frozen = [layer.weight for layer in trained.values() if not layer.weight.requires_grad]
    try:
        model.eval()
        for weight in frozen:
            weight.requires_grad_(True)
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
        for module, flag in flags.items():
            module.training = flag


class _Gradients:
    """Sums of gradients and their squares over batches, in float32 or wider."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.squares: Tensor | None = None

    def add(self, grad: Tensor) -> None:
        grad = grad.detach().to(torch.promote_types(grad.dtype, torch.float32))
        self.total = grad.clone() if self.total is None else self.total.add_(grad)
        self.squares = grad.square() if self.squares is None else self.squares.addcmul_(grad, grad)

    def means(self, count: int) -> tuple[Tensor, Tensor]:
        assert self.total is not None
        assert self.squares is not None
        return self.total / count, self.squares / count


def _add_gradients(loss: Tensor, layers: Mapping[str, Layer], slopes: Mapping[str, _Gradients]) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not bool(torch.isfinite(loss)):
        raise ValueError(f"loss_fn must return one finite number as a tensor, got {loss!r}")
    # Not backward(): the user's .grad stays as it is.
    weights = [layer.weight for layer in layers.values()]
    grads = torch.autograd.grad(loss, weights, allow_unused=True)
    for name, weight, grad in zip(layers, weights, grads, strict=True):
        grad = torch.zeros_like(weight) if grad is None else grad
        check_finite(grad, f"gradient of {name!r}")
        slopes[name].add(grad)


class _Inputs:
    """Sum of squares of each input of one module."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.padding: Tensor | None = None
        self.sums: Tensor | None = None
        self.rows = 0
        self.columns = int(getattr(module, "in_features", 0) or getattr(module, "nx", 0))
        self.conv = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        self.groups = module.groups if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else 1
        if not (self.conv or isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
            raise ValueError(
                f"inputs of {name!r} ({type(module).__name__}) are not known column by column; exclude the layer "
                "or use a score without input norms"
            )

    @torch.no_grad()
    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.conv:
            sums = _unfolded_squares(module, x.to(wide))
        else:
            flat = self._tokens(x).reshape(-1, x.shape[-1])
            sums = torch.linalg.vector_norm(flat, dim=0, dtype=wide).square()
        self.rows += x.numel()
        self.sums = sums if self.sums is None else self.sums + sums

    def _tokens(self, x: Tensor) -> Tensor:
        """Without padding rows, where the layer sees one row per token of the mask."""
        padding = self.padding
        if not isinstance(padding, Tensor) or padding.ndim != 2:
            return x
        if x.shape[:2] == padding.shape and x.ndim == 3:
            return x[padding.bool()]
        if x.ndim == 2 and x.shape[0] == padding.numel():
            return x[padding.reshape(-1).bool()]
        return x

    def norm(self, weight: Tensor) -> Tensor:
        if self.sums is None or self.rows == 0:
            # An expert without tokens, or a layer whose weight is used without calling it.
            warnings.warn(f"{self.name!r} saw no input; its norms are taken as 1", stacklevel=3)
            return torch.ones((), device=weight.device).expand(weight.shape if self.conv else (self.columns,))
        check_finite(self.sums, f"inputs of {self.name!r}")
        norm = self.sums.sqrt()
        if self.groups == 1:
            return norm
        # An output channel of a group sees the channels of that group only.
        grouped = norm.reshape(self.groups, 1, -1, *norm.shape[1:])
        return grouped.expand(-1, weight.shape[0] // self.groups, *grouped.shape[2:]).reshape(weight.shape)


def _unfolded_squares(conv: nn.Module, x: Tensor) -> Tensor:
    """Exact squared norm of each column of the unfolded input, ``[in, *kernel]``, without unfolding it."""
    assert isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    spatial = len(conv.kernel_size)
    x = x if x.ndim == spatial + 2 else x.unsqueeze(0)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode).square()
    sums = x.new_empty(x.shape[1], *conv.kernel_size)
    outputs = [
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, dilation in zip(
            x.shape[2:], conv.kernel_size, conv.stride, conv.dilation, strict=True
        )
    ]
    for offset in itertools.product(*map(range, conv.kernel_size)):
        window = [slice(None), slice(None)] + [
            slice(o * d, o * d + s * (n - 1) + 1, s)
            for o, d, s, n in zip(offset, conv.dilation, conv.stride, outputs, strict=True)
        ]
        kept = x[tuple(window)]
        here: tuple[Any, ...] = (slice(None), *offset)
        sums[here] = kept.sum(dim=[0, *range(2, kept.ndim)]) if math.prod(outputs) else 0
    return sums
