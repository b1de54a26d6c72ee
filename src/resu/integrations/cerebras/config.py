"""ModelZoo configurations (the content of a YAML file) with masks in them; nothing of Cerebras is imported."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["MODES", "create_sparse_config", "sparsity_block"]

MODES = ("sparse_to_dense", "sparse_to_sparse")
_CALLBACK, _LORA = "SparseMaskCallback", "Lora"


def create_sparse_config(
    base_config: Mapping[str, Any],
    mask_path: str,
    lora_config: Mapping[str, Any] | None = None,
    sparse_mode: str = "sparse_to_dense",
) -> dict[str, Any]:
    """A trainer configuration that applies masks, and trains low-rank adapters where asked.

    ``trainer.init.callbacks`` gets ``SparseMaskCallback`` and, with ``lora_config``, ``Lora``; entries of these names
    (in any case, as ModelZoo reads them) are changed instead of being doubled. All else stays, ``base_config`` itself
    too. ModelZoo knows callbacks that have been imported: import ``resu.integrations.cerebras.callback`` in the model
    or data module, or in the script that starts the run.

    Args:
        base_config: Of a run, as ``yaml.safe_load`` gives it.
        mask_path: File of masks whose names are those of the model's parameters.
        lora_config: ``lora_params`` of ModelZoo's ``Lora`` callback, such as ``{"r": 16, "alpha": 32}``. Keys that are
            given replace those of a ``Lora`` entry that is there.
        sparse_mode: ``"sparse_to_dense"``: masks are applied once, when training starts; what trains then may be dense.
            ``"sparse_to_sparse"``: they are applied after each optimizer step too.

    Raises:
        ValueError: If the mode is not known, the path is empty, or the configuration has another form.

    Example:
        >>> create_sparse_config({"trainer": {"init": {"seed": 1}}}, "masks.npz")["trainer"]["init"]["callbacks"]
        [{'SparseMaskCallback': {'mask_path': 'masks.npz', 'apply_every_step': False}}]
    """
    if sparse_mode not in MODES:
        raise ValueError(f"unknown sparse_mode {sparse_mode!r}; known: {', '.join(MODES)}")
    if not mask_path:
        raise ValueError("mask_path is empty; give a file of masks")
    config: dict[str, Any] = copy.deepcopy(dict(base_config))
    callbacks = _callbacks(config)
    every = sparse_mode == "sparse_to_sparse"
    _set(callbacks, _CALLBACK, {"mask_path": str(mask_path), "apply_every_step": every})
    if lora_config is not None:
        held = _find(callbacks, _LORA)
        old = (held or {}).get("lora_params") or {}
        if not isinstance(old, Mapping):
            raise ValueError(
                f"the Lora callback has several lora_params; give lora_config=None to leave it, got {old!r}"
            )
        _set(callbacks, _LORA, {**(held or {}), "lora_params": {**old, **lora_config}})
    return config


def sparsity_block(
    sparsity: float, param_filter: Iterable[str] | None = None, *, init_method: str = "from_zeros"
) -> dict[str, Any]:
    """``trainer.init.sparsity`` for masks that do not change: Cerebras' own static sparsity, fast on the wafer.

    Args:
        sparsity: Fraction removed, [0, 1); with ``"from_zeros"`` the masks are the zeros of the weights, and this
            number is a hint to the compiler.
        param_filter: Globs over parameter names; None: all matrices but embeddings, norms and the head.
        init_method: ``"from_zeros"``, ``"topk"``, ``"random"`` or ``"checkerboard"``.

    Raises:
        ValueError: If the sparsity is outside [0, 1) or the method is not known.

    Example:
        >>> sparsity_block(0.5, ["*.weight"])
        {'algorithm': 'static', 'sparsity': 0.5, 'init_method': 'from_zeros', 'param_filter': ['*.weight']}
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity!r}")
    known = ("from_zeros", "topk", "random", "checkerboard")
    if init_method not in known:
        raise ValueError(f"unknown init_method {init_method!r}; known: {', '.join(known)}")
    block: dict[str, Any] = {"algorithm": "static", "sparsity": float(sparsity), "init_method": init_method}
    return block if param_filter is None else {**block, "param_filter": list(param_filter)}


def _callbacks(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The list ``trainer.init.callbacks`` of a configuration, made where it is not there, and checked."""
    place, where = config, []
    for key in ("trainer", "init"):
        where.append(key)
        if place.get(key) is None:
            place[key] = {}
        place = place[key]
        if not isinstance(place, dict):
            raise ValueError(f"{'.'.join(where)} must be a mapping, got {type(place).__name__}")
    if place.get("callbacks") is None:
        place["callbacks"] = []
    found = place["callbacks"]
    if not isinstance(found, list) or not all(isinstance(c, dict) and len(c) == 1 for c in found):
        raise ValueError("trainer.init.callbacks must be a list of mappings with one key each, the callback's name")
    return found


def _find(callbacks: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    for entry in callbacks:
        for key, value in entry.items():
            if key.lower() == name.lower():
                return dict(value or {})
    return None


def _set(callbacks: list[dict[str, Any]], name: str, arguments: dict[str, Any]) -> None:
    """Put an entry where one of that name is, or at the end."""
    for place, entry in enumerate(callbacks):
        if next(iter(entry)).lower() == name.lower():
            callbacks[place] = {name: arguments}
            return
    callbacks.append({name: arguments})
