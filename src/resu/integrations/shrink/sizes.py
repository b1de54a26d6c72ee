"""The sizes of a transformer block by block, and a model built with sizes that its architecture cannot be told."""

from __future__ import annotations

from functools import cache
from typing import Any

from resu.integrations.shrink.cutting import keep_first
from resu.integrations.shrink.families import Site, sites_of

__all__ = ["KEY", "VERSION", "shrunk_class", "sizes_of"]

#: Key of ``config.json`` for what the other keys cannot say: query heads and neurons per block.
KEY = "resu_shrunk"
VERSION = 1


def sizes_of(model: Any) -> dict[str, list[int]]:
    """Query heads (``heads``) and neurons (``ffn``) of each block.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> config = LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=172, num_hidden_layers=2,
        ...                      num_attention_heads=8, num_key_value_heads=4)
        >>> sizes_of(LlamaModel(config))
        {'heads': [8, 8], 'ffn': [172, 172]}
    """
    found: dict[str, list[int]] = {"heads": [], "ffn": []}
    for site in sites_of(model):
        found[site.kind].append(site.count * site.queries)
    return found


@cache
def shrunk_class(kind: Any) -> Any:
    """A class whose models have the sizes under :data:`KEY` of their configuration, and are of class ``kind``.

    ``from_pretrained`` of it loads weights of these sizes as it would load any others: in shards, in any dtype, onto
    any device.
    """

    def build(self: Any, config: Any, *args: Any, **options: Any) -> None:
        kind.__init__(self, config, *args, **options)
        resize(self, getattr(config, KEY, None))
        self.__class__ = kind  # nothing of ours is left in it

    own = {"__init__": build, "__module__": kind.__module__, "__doc__": kind.__doc__, "resizes": True}
    return type(kind.__name__, (kind,), own)


def resize(model: Any, stated: Any) -> None:
    """Give a model the sizes of :data:`KEY`; the first units of each part stay.

    Raises:
        ValueError: If they are of a newer version, damaged, or not of this model.
    """
    if not isinstance(stated, dict) or stated.get("version") != VERSION:
        raise ValueError(
            f"the configuration has no {KEY} of version {VERSION}, but {stated!r}; written by a newer resu, or edited"
        )
    sites = sites_of(model)
    for kind in ("heads", "ffn"):
        here = [site for site in sites if site.kind == kind]
        sizes = stated.get(kind, [site.count * site.queries for site in here])
        fits = isinstance(sizes, list) and len(sizes) == len(here)
        if not fits or not all(_possible(size, site) for size, site in zip(sizes, here, strict=True)):
            raise ValueError(
                f"{KEY} of the configuration gives {kind} {sizes!r}; needed are {len(here)} numbers, one per block, "
                "none of them larger than what the other keys say"
            )
        counts = [(site, size // site.queries) for size, site in zip(sizes, here, strict=True)]
        keep_first(model.base_model, [(site, count) for site, count in counts if count < site.count])


def _possible(size: Any, site: Site) -> bool:
    whole = isinstance(size, int) and not isinstance(size, bool) and size % site.queries == 0
    return whole and 0 < size <= site.count * site.queries
