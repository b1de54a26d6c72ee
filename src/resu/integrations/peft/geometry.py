"""Target layers as matrices ``[out, in…]``, whatever way they store their weight."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from resu.core.layers import is_conv1d_of_transformers
from resu.core.mask import SparseMask
from resu.core.mask_files import read_masks
from resu.core.pattern import Unstructured
from resu.pruning.importance import importances
from resu.pruning.statistics import Stats

__all__ = ["as_weight", "check_target", "choose_mask", "matrix", "padded_input", "product", "rows_and_columns"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def matrix(layer: nn.Module, x: Tensor) -> Tensor:
    """``x``, of the shape of the layer's weight, with outputs first: a view (of ``Conv1D`` the transposed one)."""
    return x.t() if is_conv1d_of_transformers(layer) else x


def rows_and_columns(layer: nn.Module, weight: Tensor) -> Tensor:
    """The weight as ``[out, in]``, kernels of a convolution laid out flat: a view."""
    return matrix(layer, weight).flatten(1)


def as_weight(layer: nn.Module, rows: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`rows_and_columns`; ``shape`` is that of the weight."""
    return rows.t() if is_conv1d_of_transformers(layer) else rows.view(shape)


def product(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What ``layer`` would give for ``x`` if it had this ``weight`` (``[out, in]``): for convolutions."""
    assert isinstance(layer, nn.Conv2d)
    y: Tensor = layer._conv_forward(x, as_weight(layer, weight, layer.weight.shape), layer.bias)
    return y


def padded_input(layer: nn.Conv2d, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input and the padding of zeros that are left for a convolution that knows no other."""
    if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return x, layer.padding
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode), (0, 0)


def check_target(target: nn.Module, name: str, parent: nn.Module) -> None:
    """Raise unless the module can be adapted.

    Raises:
        TypeError: If it is no ``nn.Linear``, ``Conv1D`` or ``nn.Conv2d`` with a plain floating weight, or is never
            called: ``nn.MultiheadAttention`` multiplies with the weight of its output projection itself.
        ValueError: If its weight is on no device or empty.
    """
    weight = getattr(target, "weight", None)
    known = isinstance(target, (nn.Linear, nn.Conv2d)) or is_conv1d_of_transformers(target)
    if not known or not isinstance(weight, nn.Parameter) or weight.dtype not in _FLOATS:
        of = f" with a weight of {weight.dtype}" if isinstance(weight, Tensor) else ""
        raise TypeError(
            f"target module {name!r} is a {type(target).__name__}{of}; nn.Linear, Conv1D of transformers and "
            "nn.Conv2d with floating weights can be adapted. Name others in exclude_modules"
        )
    if isinstance(parent, nn.MultiheadAttention):
        raise TypeError(
            f"target module {name!r} is never called: nn.MultiheadAttention multiplies with its weight itself, and an "
            "adapter would do nothing. Name it in exclude_modules"
        )
    if weight.numel() == 0 or weight.is_meta:
        where = "on the meta device (offloaded?)" if weight.is_meta else "empty"
        raise ValueError(f"the weight of target module {name!r} is {where}; load it first, or exclude the module")


def _entry(given: Mapping[str, Any], name: str, what: str) -> Any:
    """The entry of a target by its weight's name or its own."""
    for key in (f"{name}.weight", name):
        if key in given:
            return given[key]
    raise ValueError(
        f"{what} holds nothing for target module {name!r} (looked for {name + '.weight'!r} and {name!r}); it has: "
        f"{', '.join(list(given)[:8]) or 'nothing'}{', …' if len(given) > 8 else ''}"
    )


def choose_mask(layer: nn.Module, name: str, config: Any) -> SparseMask:
    """The mask of a target over ``[out, in]`` (:func:`rows_and_columns`), by the configuration.

    Raises:
        ValueError: If masks or statistics that were given lack this target or do not fit it, or weights are not finite.
    """
    own = layer.weight
    assert isinstance(own, Tensor)
    weight = matrix(layer, own.detach())
    if config.masks is None:
        importance = importances[config.method]
        stats: Stats | None = None
        if importance.needs:
            if config.stats is None:
                raise ValueError(
                    f"method {config.method!r} needs stats of data: pass stats=resu.pruning.statistics.collect(…), or "
                    "method='magnitude'"
                )
            stats = _entry(config.stats, name, "stats")
        chosen = Unstructured(importance.scope).mask(importance(weight, stats), config.sparsity)
        return SparseMask(chosen.flatten(1))
    if isinstance(config.masks, (str, os.PathLike)):
        config.masks = read_masks(config.masks)[0]  # read once, for all targets
    mask = _entry(config.masks, name, "masks")
    bits = mask.mask if isinstance(mask, SparseMask) else mask
    if bits.shape != own.shape:
        raise ValueError(
            f"the mask of target module {name!r} has shape {tuple(bits.shape)}, its weight {tuple(own.shape)}"
        )
    return SparseMask(matrix(layer, bits.to(weight.device)).flatten(1).contiguous())
