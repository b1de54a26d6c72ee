"""Statistics that scores look at: norms of a layer's inputs, gradients of its weight."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from resu.core.counting import check_finite
from resu.core.layers import Layer
from resu.pruning.inputs import Inputs, padding_masks

__all__ = ["NEEDS", "Stats", "collect", "eager", "input_stats", "run_batch", "to_device", "undisturbed"]

NEEDS = frozenset({"inputs", "grads", "hessian"})


@dataclass(frozen=True)
class Stats:
    """What a score may look at beside the weight; only what it declared in ``needs`` is there.

    Attributes:
        grad: Gradient of the loss, mean over batches, ``[out, in…]``.
        grad_squared: Mean over batches of the squared gradient, ``[out, in…]``.
        input_norm: L2 norm of each input over all tokens, float32 (float64 for a float64 model): ``[in]`` for a
            linear layer, ``[in, kh, kw]`` for a convolution, or the shape of the weight's matrix where rows see
            different inputs (``[experts * out, in]``, grouped convolutions).
        input_mean: Mean of each input over all tokens, of the shape of ``input_norm``.
        hessian: ``(2/n) Σ x xᵀ`` over the n tokens, ``[in, in]``; of the unfolded input for a convolution,
            ``[in * kh * kw, in * kh * kw]``; ``[parts, in, in]`` where parts of the rows see different inputs (experts,
            groups). Float32 (float64 for a float64 model).
        parts: How many parts of equally many rows see inputs of their own (groups of a convolution); a column of one is
            another input than the same column of the next.
        generator: For scores that draw; None: the global one.
    """

    grad: Tensor | None = None
    grad_squared: Tensor | None = None
    input_norm: Tensor | None = None
    input_mean: Tensor | None = None
    hessian: Tensor | None = None
    parts: int = 1
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
    an error. Sums are in float32 or wider, so half-precision inputs do not overflow. Where a batch is a mapping
    with an ``attention_mask`` ``[batch, tokens]`` (or ``[batch, 1, tokens, tokens]``), padding tokens do not count,
    also not behind a router. What an expert saw is told from the multiplications with its matrix, so that any eager
    implementation of fused experts works; Hugging Face models are set to theirs for the while.

    All layers are collected at once: for Hessians that is ``in²`` numbers per layer. :mod:`resu.pruning.layerwise` goes
    block by block.

    Args:
        model: Any module.
        layers: From :func:`resu.core.layers.select`.
        batches: A tensor, a tuple whose first entry is the input, or a mapping of keyword arguments, each; moved
            to the model's device.
        needs: Of ``"inputs"`` (norms and means), ``"hessian"``, ``"grads"``.
        loss_fn: ``loss_fn(model, batch) -> scalar``; needed for ``"grads"``.
        forward: How to run a batch where the default is not right.

    Returns:
        ``{name: Stats}``. Gradients come as scores see the weight (:meth:`resu.core.layers.Layer.matrix`).

    Raises:
        ValueError: Without batches, on an unknown need, a layer type whose inputs are not known, experts whose
            inputs cannot be seen, or NaN in inputs, loss or gradients.

    A layer or an expert that saw no token gets norms of 1 and the identity as its Hessian, with a warning that
    names it.

    Example:
        >>> from resu.core.layers import select
        >>> model = nn.Sequential(nn.Linear(2, 3))
        >>> stats = collect(model, select(model), [torch.tensor([[3.0, 0.0], [4.0, 1.0]])])
        >>> stats["0.weight"].input_norm
        tensor([5., 1.])
    """
    unknown = set(needs) - NEEDS
    if unknown:
        raise ValueError(f"cannot collect {', '.join(sorted(unknown))}; known: {', '.join(sorted(NEEDS))}")
    grads = "grads" in needs
    if grads and loss_fn is None:
        raise ValueError("gradient statistics need loss_fn(model, batch) -> loss")
    run = forward or run_batch
    inputs = Inputs(layers, needs) if {"inputs", "hessian"} & set(needs) else None
    slopes = {n: _Gradients() for n in layers} if grads else {}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    count = 0
    with undisturbed(model, layers if grads else {}), eager(model), torch.set_grad_enabled(grads):
        for batch in batches:
            count += 1
            batch = to_device(batch, device)
            with ExitStack() as stack:
                if inputs is not None:
                    stack.enter_context(inputs.watching(padding_masks(batch)))
                loss = loss_fn(model, batch) if grads and loss_fn is not None else run(model, batch)
            if grads:  # not watched: backward multiplies with the same weights
                _add_gradients(loss, layers, slopes)
    if not count:
        raise ValueError("there is no batch to collect statistics from; pass an iterable that can be run again")
    if inputs is not None:
        inputs.warn()
    result = {}
    for name, layer in layers.items():
        grad, square = slopes[name].means(count) if grads else (None, None)
        if grad is not None and square is not None:
            grad, square = layer.matrix(grad), layer.matrix(square)
        seen = Stats() if inputs is None else input_stats(inputs, name, needs)
        result[name] = replace(seen, grad=grad, grad_squared=square)
    return result


def input_stats(inputs: Inputs, name: str, needs: Collection[str]) -> Stats:
    """What the inputs of one layer say."""
    norms = "inputs" in needs
    return Stats(
        input_norm=inputs.norm(name) if norms else None,
        input_mean=inputs.mean(name) if norms else None,
        hessian=inputs.hessian(name) if "hessian" in needs else None,
    )


def run_batch(model: nn.Module, batch: Any) -> object:
    """The default way to run a batch: a mapping as keyword arguments, else the batch or its first entry."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on ``device``; other things as they are."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [to_device(value, device) for value in batch]
    return batch


@contextmanager
def undisturbed(model: nn.Module, trained: Mapping[str, Layer]) -> Iterator[None]:
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


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Hugging Face models compute experts one by one and keep no cache; afterwards as before.

    Fused kernels show no inputs, and a cache would grow each time a block runs again.
    """
    switched: list[tuple[Any, Any]] = []
    caching: list[Any] = []
    seen: set[int] = set()
    try:
        for module in model.modules():
            config = getattr(module, "config", None)
            if config is None or id(config) in seen:
                continue
            seen.add(id(config))
            if getattr(config, "use_cache", False) is True:
                caching.append(config)
                config.use_cache = False
            now = getattr(config, "_experts_implementation_internal", None)
            if now is not None and now != "eager":
                switched.append((config, now))
                config._experts_implementation_internal = "eager"
        yield
    finally:
        for config, before in switched:
            config._experts_implementation_internal = before
        for config in caching:
            config.use_cache = True


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


def _add_gradients(loss: object, layers: Mapping[str, Layer], slopes: Mapping[str, _Gradients]) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not bool(torch.isfinite(loss)):
        raise ValueError(f"loss_fn must return one finite number as a tensor, got {loss!r}")
    # Not backward(): the user's .grad stays as it is.
    weights = [layer.weight for layer in layers.values()]
    grads = torch.autograd.grad(loss, weights, allow_unused=True)
    for name, weight, grad in zip(layers, weights, grads, strict=True):
        grad = torch.zeros_like(weight) if grad is None else grad
        check_finite(grad, f"gradient of {name!r}")
        slopes[name].add(grad)
