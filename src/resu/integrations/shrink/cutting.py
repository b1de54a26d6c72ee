"""Units taken out of the layers of their sites, with what attention modules say of themselves."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from resu.integrations.shrink.families import Site, after
from resu.pruning.structured.keeps import Keep, slices_of
from resu.pruning.structured.removal import Removal, shrink_tensors

__all__ = ["cut_sites"]

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


def _head_counts(attention: nn.Module, site: Site) -> dict[str, int]:
    values = {
        **dict.fromkeys(_QUERY_HEADS, site.count * site.queries),
        **dict.fromkeys(_KEY_HEADS, site.count),
        **dict.fromkeys(_WIDE, site.count * site.columns.size),
    }
    return {name: value for name, value in values.items() if isinstance(getattr(attention, name, None), int)}
