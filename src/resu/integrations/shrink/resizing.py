"""Sizes of layers and what modules say of them, changed together."""

from __future__ import annotations

from torch import Tensor, nn

from resu.integrations.shrink.families import Site, after, is_transposed

__all__ = ["count_heads", "replace_parameter", "resize_site", "state_size"]

# What modules of transformers call the number of their query heads, of their key/value heads, and of all columns.
_QUERY_HEADS = ("num_attention_heads", "num_heads", "n_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
_WIDE = ("all_head_size", "split_size")


def resize_site(base: nn.Module, site: Site, count: int) -> None:
    """Give a site another number of units; the values of its weights are lost. For models that are to be loaded."""
    new = after(site, count)
    for name in dict.fromkeys(rows.module for rows in new.inner):
        rows = sum(rows.size * count for rows in new.inner if rows.module == name)
        _blank(base.get_submodule(name), rows, out=True)
    _blank(base.get_submodule(new.outer), count * new.columns.size, out=False)
    if site.kind == "heads":
        count_heads(base.get_submodule(site.name), new)


def _blank(module: nn.Module, size: int, *, out: bool) -> None:
    weight = module.get_parameter("weight")
    shape = list(weight.shape)
    shape[0 if out != is_transposed(module) else 1] = size
    replace_parameter(module, "weight", weight.detach().new_empty(shape))
    if out and getattr(module, "bias", None) is not None:
        replace_parameter(module, "bias", weight.detach().new_empty(size))
    state_size(module, size, out=out)


def count_heads(attention: nn.Module, site: Site) -> None:
    """Have an attention module's own numbers say what it now holds."""
    values = {
        **dict.fromkeys(_QUERY_HEADS, site.count * site.queries),
        **dict.fromkeys(_KEY_HEADS, site.count),
        **dict.fromkeys(_WIDE, site.count * site.columns.size),
    }
    for name, value in values.items():
        if isinstance(getattr(attention, name, None), int):
            setattr(attention, name, value)


def replace_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor of another shape in the place of a parameter; whether it trains stays."""
    before = module.get_parameter(name)
    setattr(module, name, nn.Parameter(value, requires_grad=before.requires_grad))


def state_size(module: nn.Module, size: int, *, out: bool) -> None:
    """Have a linear layer's own number of outputs or inputs say what it now is."""
    for name in ("out_features", "nf") if out else ("in_features", "nx"):
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, size)
