"""Adapters of a whole model into its weights, and out again."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

from torch import nn

from resu.core.globs import listing
from resu.pruning.sparse_lora.apply import get_lora_layers
from resu.pruning.sparse_lora.layer import SparseLoRALayer

__all__ = ["merge_all_lora_weights", "merge_loss", "unmerge_all_lora_weights"]


def merge_all_lora_weights(
    model: nn.Module, preserve_sparsity: bool = True, adapters: Iterable[str] | None = None
) -> nn.Module:
    """Write adapters into the weights, in place; masks stay bit-exact unless they are given up here.

    In the modes ``sparse_to_sparse`` and ``scale`` the weight that was trained with is the weight that is written. In
    ``sparse_to_dense`` the trained weight is dense: laying the mask on it again takes away what the adapter has learnt
    at pruned positions, and the model is not the one that was trained. How much that is, is measured and warned of.
    A packed base (``base_bits``) is merged as the values its codes stand for, which is what the adapter was trained on.

    Until :func:`unmerge_all_lora_weights` each layer keeps what its base was: the kept values, (1 - sparsity) of the
    weight's bytes, or the codes.

    Args:
        model: With adapters.
        preserve_sparsity: False, or ``preserve_sparsity_on_merge=False`` in the adapter's config: a dense weight is
            written in ``sparse_to_dense``, the one that was trained, and the mask is not held until that is taken out.
        adapters: Names; those that are active, by default. Added up in one sum.

    Returns:
        The model.

    Raises:
        ValueError: If the model has no adapters, or a layer none of these names.

    Warns:
        UserWarning: If the mask takes something away, with its share ``‖(1-M)⊙s·BA‖ / ‖M⊙W + s·BA‖``.

    Example:
        >>> from resu.pruning.sparse_lora.apply import apply_sparse_lora
        >>> from resu.pruning.sparse_lora.config import SparseLoRAConfig
        >>> config = SparseLoRAConfig(r=2, sparsity_mode="sparse_to_sparse")
        >>> model = apply_sparse_lora(nn.Sequential(nn.Linear(8, 8)), None, config)
        >>> merge_all_lora_weights(model)[0].merged
        ('default',)
    """
    layers = get_lora_layers(model)
    if not layers:
        raise ValueError("the model has no sparse LoRA adapters; apply_sparse_lora puts them there")
    given = None if adapters is None else list(adapters)
    names = {name: _names(layer, given) for name, layer in layers.items()}
    if given is not None:
        unknown = [one for one in given if not any(one in layer.configs for layer in layers.values())]
        if unknown:
            known = list(dict.fromkeys(one for layer in layers.values() for one in layer.configs))
            raise ValueError(f"no layer has an adapter {unknown[0]!r}; there are: {listing(known) or 'none'}")
    masked = {name: preserve_sparsity and _preserves(layer, names[name]) for name, layer in layers.items()}
    _warn_of_loss({name: layers[name].dropped(names[name]) for name, keep in masked.items() if keep})
    for name, layer in layers.items():
        layer.merge(names[name], preserve_sparsity=masked[name])
    return model


def unmerge_all_lora_weights(model: nn.Module) -> nn.Module:
    """Take all merged adapters out of the weights: every base weight is what it was, bit for bit.

    Returns:
        The model.
    """
    for layer in get_lora_layers(model).values():
        layer.unmerge()
    return model


def merge_loss(model: nn.Module) -> dict[str, float]:
    """What a merge that preserves sparsity would take away of the weight that acts, by name of the weight.

    ``‖(1-M)⊙s·BA‖ / ‖M⊙W + s·BA‖`` (Frobenius) in ``sparse_to_dense``; 0 in the modes that train with the mask.
    """
    found = {}
    for name, layer in get_lora_layers(model).items():
        lost, total = layer.dropped()
        found[name] = math.sqrt(lost / total) if total else 0.0
    return found


def _names(layer: SparseLoRALayer, given: list[str] | None) -> list[str] | None:
    return None if given is None else [name for name in given if name in layer.configs]


def _preserves(layer: SparseLoRALayer, names: list[str] | None) -> bool:
    names = layer.active if names is None else names
    return all(layer.configs[name].preserve_sparsity_on_merge for name in names)


def _warn_of_loss(squares: dict[str, tuple[float, float]]) -> None:
    lost, total = (sum(part) for part in zip(*squares.values(), strict=True)) if squares else (0.0, 1.0)
    if not lost:
        return
    worst, (its_lost, its_total) = max(squares.items(), key=lambda item: item[1][0] / item[1][1])
    share, its_share = math.sqrt(lost / total), math.sqrt(its_lost / its_total)
    warnings.warn(
        f"sparse_to_dense: laying the masks on the merged weights takes away {share:.3g} of what was trained "
        f"(Frobenius norm, relative; most in {worst!r}: {its_share:.3g}), so this is not the model that was trained; "
        "train with sparsity_mode='sparse_to_sparse', or merge with preserve_sparsity=False and get dense weights",
        stacklevel=3,
    )
