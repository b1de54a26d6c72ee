"""Units taken out of the layers of their sites, with what attention modules say of themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from resu.core.layers import is_conv1d_of_transformers
from resu.integrations.shrink.families import Site, after
from resu.pruning.structured.keeps import Keep, slices_of
from resu.pruning.structured.removal import Removal, shrink_tensors

__all__ = ["cut_sites", "keep_first"]

# What modules of transformers call the number of their query heads, of their key/value heads, and of all columns.
_QUERY_HEADS = ("num_attention_heads", "num_heads", "n_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
_WIDE = ("all_head_size", "split_size")


def cut_sites(base: nn.Module, kept: Iterable[tuple[Site, Tensor]]) -> Removal:
    """Keep only some units of sites, in place.

    Args:
        base: The base model.
        kept: Sites and the units of each that stay, int64 and ascending.

    Returns:
        Whose ``undo`` puts back what was there.
    """
    keeps: dict[str, Keep] = {}
    attributes: dict[str, dict[str, int]] = {}
    for site, stay in kept:
        for name in dict.fromkeys(rows.module for rows in site.inner):
            keeps[name] = Keep(out=torch.cat([rows.of(stay) for rows in site.inner if rows.module == name]))
        keeps[site.outer] = Keep(in_=site.columns.of(stay))
        if site.kind == "heads":
            attributes[site.name] = _head_counts(base.get_submodule(site.name), after(site, len(stay)))
    return shrink_tensors(base, slices_of(base, keeps), attributes=attributes)


def keep_first(base: nn.Module, counts: Iterable[tuple[Site, int]]) -> None:
    """Keep the first units of sites, in place and for good, and by sizes alone.

    :func:`cut_sites` looks at indices, which have no values where a model is built without memory (in a dry run, whose
    tensors are all fake).

    Args:
        base: The base model.
        counts: Sites and how many units of each stay.
    """
    for site, count in counts:
        spans: dict[str, list[tuple[int, int]]] = {}
        for rows in site.inner:
            spans.setdefault(rows.module, []).append((rows.start, count * rows.size))
        for name, parts in spans.items():
            _narrow(base.get_submodule(name), 0, parts)
        _narrow(base.get_submodule(site.outer), 1, [(0, count * site.columns.size)])
        if site.kind == "heads":
            attention = base.get_submodule(site.name)
            for attribute, value in _head_counts(attention, after(site, count)).items():
                setattr(attention, attribute, value)


def _narrow(layer: nn.Module, dim: int, parts: Sequence[tuple[int, int]]) -> None:
    """Keep parts, given by start and length, of what a layer gives (``dim`` 0) or reads (1)."""
    turned = is_conv1d_of_transformers(layer)
    for name, parameter in list(layer.named_parameters(recurse=False)):
        if name == "weight" or dim == 0:
            along = 1 - dim if turned and name == "weight" else dim
            kept = torch.cat([parameter.detach().narrow(along, start, length) for start, length in parts], dim=along)
            layer.register_parameter(name, nn.Parameter(kept, parameter.requires_grad))
    sizes = ("nf", "nx") if turned else ("out_features", "in_features")
    setattr(layer, sizes[dim], sum(length for _, length in parts))


def _head_counts(attention: nn.Module, site: Site) -> dict[str, int]:
    values = {
        **dict.fromkeys(_QUERY_HEADS, site.count * site.queries),
        **dict.fromkeys(_KEY_HEADS, site.count),
        **dict.fromkeys(_WIDE, site.count * site.columns.size),
    }
    return {name: value for name, value in values.items() if isinstance(getattr(attention, name, None), int)}
