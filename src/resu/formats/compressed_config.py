"""The part of ``config.json`` that names the sparse layout of a model directory, as compressed-tensors wrote it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from resu.core.io import FileFormatError

__all__ = [
    "LAYOUTS",
    "find_sparsity_config",
    "layout_of",
    "sparsity_config",
    "with_sparsity_config",
    "without_sparsity_config",
]

LAYOUTS = ("sparse-bitmask", "sparse-24-bitmask")
"""The layouts of compressed-tensors up to 0.14 that hold one bit per weight and the kept values."""

_METHOD = "compressed-tensors"
_BLOCK = "sparsity_config"
# Where versions of the library have put it: today's place, the one before, and the first.
_PLACES = ("quantization_config", "compression_config")


def sparsity_config(
    layout: str, names: Iterable[str], *, pruned: int, numel: int, ignore: Iterable[str] = ()
) -> dict[str, Any]:
    """The block ``sparsity_config`` for weights that are stored in a sparse layout.

    Args:
        layout: ``"sparse-bitmask"`` or ``"sparse-24-bitmask"``.
        names: Of the weights in this layout; ``targets`` names their modules one by one, because a class name such
            as ``Linear`` would also claim modules that stay dense.
        pruned: Positions removed.
        numel: Positions of all the model's parameters, so that ``global_sparsity`` is that of the whole model.
        ignore: Modules that a reader shall leave alone whatever ``targets`` says.

    Raises:
        ValueError: If the layout is not known.

    Example:
        >>> sparsity_config("sparse-24-bitmask", ["fc1.weight"], pruned=8, numel=20)
        {'format': 'sparse-24-bitmask', 'targets': ['fc1'], 'ignore': [], 'global_sparsity': 0.4,
         'sparsity_structure': '2:4'}
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not known; known: {', '.join(LAYOUTS)}")
    return {
        "format": layout,
        "targets": [name.removesuffix(".weight") for name in names],
        "ignore": list(ignore),
        "global_sparsity": pruned / numel if numel else 0.0,
        "sparsity_structure": "2:4" if layout == "sparse-24-bitmask" else "unstructured",
    }


def find_sparsity_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The block in a ``config.json``, at the present place or an older one; None if there is none.

    Raises:
        FileFormatError: If it is there and is no object.
    """
    for holder in (*(config.get(place) for place in _PLACES), config):
        block = holder.get(_BLOCK) if isinstance(holder, Mapping) else None
        if block:
            if not isinstance(block, Mapping):
                raise FileFormatError(f"{_BLOCK} of the config must be an object, got {type(block).__name__}")
            return dict(block)
    return None


def layout_of(config: Mapping[str, Any]) -> str:
    """The layout a ``config.json`` announces: ``"dense"`` where it announces none.

    Raises:
        FileFormatError: If it is one this library cannot read.

    Example:
        >>> layout_of({"sparsity_config": {"format": "sparse_bitmask"}}), layout_of({})
        ('sparse-bitmask', 'dense')
    """
    block = find_sparsity_config(config)
    found = str((block or {}).get("format", "dense")).replace("_", "-")
    if found not in (*LAYOUTS, "dense"):
        raise FileFormatError(f"the config announces the layout {found!r}; this version of resu reads {LAYOUTS}")
    return found


def without_sparsity_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` that announces no sparse layout; whatever it says of quantization stays.

    Example:
        >>> block = sparsity_config("sparse-bitmask", ["fc1.weight"], pruned=1, numel=4)
        >>> without_sparsity_config(with_sparsity_config({"model_type": "llama"}, block))
        {'model_type': 'llama'}
    """
    rest = {key: value for key, value in config.items() if key != _BLOCK}
    for place in _PLACES:
        holder = rest.get(place)
        if not isinstance(holder, Mapping) or holder.get("quant_method", _METHOD) != _METHOD:
            continue
        inner = {key: value for key, value in holder.items() if key != _BLOCK}
        # These two say who wrote the block, and nothing without one; the library leaves empty objects behind.
        if not any(value for key, value in inner.items() if key not in ("quant_method", "version")):
            del rest[place]
        else:
            rest[place] = inner
    return rest


def with_sparsity_config(config: Mapping[str, Any], block: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` that announces the block, at the place where compressed-tensors up to 0.14 looks for it.

    Raises:
        ValueError: If the model is quantized by another method: a config has one place for both.
    """
    rest = without_sparsity_config(config)
    held = rest.get("quantization_config") or {}
    if held and held.get("quant_method") != _METHOD:
        raise ValueError(
            f"the config says the model is quantized by {held.get('quant_method')!r}; a sparse layout can be announced "
            f"for a model that is not quantized, or by {_METHOD}"
        )
    return {**rest, "quantization_config": {"quant_method": _METHOD, **held, _BLOCK: dict(block)}}
