"""The sizes of a smaller transformer in its configuration, and in a key of ours where the architecture has none.

A configuration holds one number of heads and one feed-forward width for all blocks, and many architectures compute the
size of a head from the number of heads. Whether a configuration can say the sizes of a model is not looked up but
tried: the model is built from it without memory, and its shapes are compared.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from copy import deepcopy
from typing import Any

import torch

from resu.integrations.hf import quiet
from resu.integrations.shrink.families import blocks_of, family_of, sites_of
from resu.integrations.shrink.sizes import KEY, VERSION, shrunk_class, sizes_of

__all__ = ["builds", "state_sizes"]

# What a block computes with beside its weights; another value after loading would be a silently wrong model.
_NUMBERS = ("head_dim", "attention_head_size", "scaling", "sliding_window", "is_causal", "attention_type")
_WAYS = (("heads", "ffn"), ("ffn",), ("heads",), ())


def state_sizes(model: Any, blocks: Sequence[int] | None = None) -> None:
    """Write the sizes that a model has into its configuration, under :data:`KEY` where it has no other place for them.

    Args:
        model: After units and blocks were removed.
        blocks: The former indices of its blocks, where some were removed.

    Raises:
        ValueError: If the model could not be loaded again even so: a block computes with its former place.
    """
    config, sizes = model.config, sizes_of(model)
    vars(config).pop(KEY, None)
    if blocks is not None:
        if types := getattr(config, "layer_types", None):
            config.layer_types = [types[index] for index in blocks]
        config.num_hidden_layers = len(blocks)
    for stock in _WAYS:
        if all(len(set(sizes[kind])) == 1 for kind in stock):
            candidate = deepcopy(config)
            _state(candidate, model, sizes, stock)
            if builds(candidate, model):
                _state(config, model, sizes, stock)
                return
    raise ValueError(
        f"this {type(model).__name__} could not be loaded again: its blocks compute with their place in the model "
        "(such as scale_attn_by_inverse_layer_idx), which changes when blocks are removed"
    )


def _state(config: Any, model: Any, sizes: dict[str, list[int]], stock: Collection[str]) -> None:
    """Say the sizes: those of ``stock`` in the architecture's own keys, the others in ours."""
    if "ffn" in stock:
        setattr(config, family_of(model).width, sizes["ffn"][0])
    if "heads" in stock and config.num_attention_heads != sizes["heads"][0]:
        config.num_attention_heads = sizes["heads"][0]
        site = sites_of(model)[0]
        if hasattr(config, "num_key_value_heads"):
            config.num_key_value_heads = site.count
            config.head_dim = site.columns.size // site.queries  # no longer hidden_size // num_attention_heads
    if rest := {kind: sizes[kind] for kind in sizes if kind not in stock}:
        setattr(config, KEY, {"version": VERSION, **rest, "load_with": "resu.load_shrunk_transformer"})


def builds(config: Any, model: Any) -> bool:
    """Whether a model built from a configuration, as if it came from a file, has the shapes of this one."""
    try:
        with quiet(), torch.random.fork_rng(devices=[]), torch.device("meta"):
            read = type(config).from_dict(json.loads(config.to_json_string()))  # as save_pretrained writes it
            own: Any = type(model)
            kind = shrunk_class(own) if hasattr(config, KEY) else own
            built = kind._from_config(read)
    except Exception:  # each architecture refuses impossible sizes in its own way
        return False
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    if {name: parameter.shape for name, parameter in built.named_parameters()} != shapes:
        return False
    return all(_numbers(a) == _numbers(b) for a, b in zip(blocks_of(model), blocks_of(built), strict=True))


def _numbers(block: Any) -> dict[str, Any]:
    return {
        f"{name}.{key}": getattr(module, key)
        for name, module in block.named_modules()
        for key in _NUMBERS
        if hasattr(module, key)
    }
