"""How often each weight is multiplied in one pass through a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from resu.core.layers import Layer
from resu.pruning.trees import leaves

__all__ = ["uses_per_pass"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@torch.no_grad()
def uses_per_pass(model: nn.Module, layers: Mapping[str, Layer], example_inputs: Any) -> dict[str, float]:
    """Multiplications of one weight of each layer in one pass over ``example_inputs``.

    A linear layer uses each weight once per row of its input, a convolution once per place of its output (per place of
    its input if it is transposed). In an ``nn.MultiheadAttention`` projections count the rows they project: queries,
    keys, values, outputs; the one matrix for all three the mean. A weight whose module is not called (fused experts)
    counts once.

    Args:
        model: Run once, in evaluation mode; its mode is put back.
        layers: The weights to count for.
        example_inputs: A tensor, a tuple of arguments, or a dictionary of keyword arguments.

    Returns:
        ``{parameter name: uses}``; times the weights a layer keeps: its multiply-adds.

    Example:
        >>> from resu.core.layers import select
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 10))
        >>> uses_per_pass(net, select(net), torch.zeros(2, 1, 6, 6))
        {'0.weight': 32, '2.weight': 2}
    """
    uses: dict[str, float] = dict.fromkeys(layers, 0)
    handles = [
        layer.module.register_forward_hook(_counter(uses, name, layer), with_kwargs=True)
        for name, layer in layers.items()
        if not isinstance(layer.module, nn.MultiheadAttention)
    ]
    names = {id(layer.weight): name for name, layer in layers.items()}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            handles.append(module.register_forward_hook(_attention_counter(uses, names), with_kwargs=True))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        if isinstance(example_inputs, Mapping):
            model(**example_inputs)
        elif isinstance(example_inputs, (tuple, list)):
            model(*example_inputs)
        else:
            model(example_inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return {name: count or 1 for name, count in uses.items()}


def _counter(uses: dict[str, float], name: str, layer: Layer) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        uses[name] += _uses(module, layer, _first_tensor((args, kwargs)), _first_tensor(output))

    return hook


def _attention_counter(uses: dict[str, float], names: Mapping[int, str]) -> Any:
    """Of an attention, which multiplies with its weights itself, the module of the output projection uncalled."""

    def hook(module: nn.MultiheadAttention, args: Any, kwargs: Any, output: Any) -> None:
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        query, key, value = (math.prod(given[what].shape[:-1]) for what in ("query", "key", "value"))
        rows = {
            "in_proj_weight": (query + key + value) / 3,
            "q_proj_weight": query,
            "k_proj_weight": key,
            "v_proj_weight": value,
        }
        used = [(getattr(module, attribute), count) for attribute, count in rows.items()]
        for weight, count in [*used, (module.out_proj.weight, query)]:
            if id(weight) in names:
                uses[names[id(weight)]] += int(count) if count == int(count) else count

    return hook


def _first_tensor(tree: Any) -> Tensor:
    return next(leaf for _, leaf in leaves(tree) if isinstance(leaf, Tensor))


def _uses(module: nn.Module, layer: Layer, inputs: Tensor, outputs: Tensor) -> int:
    if isinstance(module, _TRANSPOSED):
        return inputs.numel() // module.in_channels
    if layer.stacked:
        return 0
    out = layer.matrix(layer.weight).shape[0]
    return outputs.numel() // out
