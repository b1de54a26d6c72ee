"""RESU and QRESU: the weights that stay are frozen, θ at pruned positions trains, and a commit ends it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resu.core.mask import SparseMask
from resu.core.pattern import get_pattern
from resu.core.resurrection import gather_theta
from resu.integrations.finetune.config import FinetuneConfig
from resu.integrations.finetune.model import LoadedModel
from resu.integrations.finetune.prepared import Masks, Prepared, beside, let_train
from resu.modules.base import RESUModule
from resu.modules.convert import convert_to_resu
from resu.modules.settings import RESUMode
from resu.pruning.amnesty import Amnesty, AmnestyConfig
from resu.pruning.sparse_lora.kinds import kind_of

__all__ = ["commit_layer", "prepare_theta"]


def prepare_theta(loaded: LoadedModel, masks: Masks, config: FinetuneConfig) -> Prepared:
    """Take every masked layer to the mode of ``config.method``.

    Layers go one after the other, so that under ``qresu`` no more than one of them is there dense and packed at once.

    Raises:
        ValueError: If a masked weight is not that of an ``nn.Linear`` or ``nn.Conv2d``, or is shared where the method
            frees it.
    """
    model, others = loaded.model, beside(loaded, config)
    try:
        convert_to_resu(model, include=list(masks))
    except ValueError as error:
        low_rank = all(kind_of(model.get_submodule(name.rpartition(".")[0])) for name in masks)
        can = "masked and sparse-lora" if low_rank else "masked"
        raise ValueError(f"{error}. Of {type(model).__name__}, {can} can train these layers") from None
    layers = {name: _layer(model, name) for name in masks}
    for name, layer in layers.items():
        mask = masks[name].to(layer.weight.device)
        start = gather_theta(layer.weight, mask) if config.theta_init == "weight" else config.theta_init
        layer.set_mask(mask)
        _enter(layer, start, config)
    let_train(model, others)

    updating = list(layers.values()) if config.method == "qresu-selective" else []
    prepared = Prepared(model, lambda: (model, {}), self_updating=updating)

    def finish() -> tuple[Any, Masks]:
        found = {name: commit_layer(layer, config) for name, layer in layers.items()}
        kept = {name: mask for name, mask in found.items() if mask is not None}
        if kept:
            prepared.notes.append(_came_back(masks, kept))
        return model, kept

    prepared.finish = finish
    return prepared


def _came_back(before: Masks, after: Masks) -> str:
    """What a commit that keeps the count made of θ; where nothing came back all that was trained is gone."""
    back = sum(int((mask.mask & ~before[name].mask.to(mask.device)).sum()) for name, mask in after.items())
    pruned = sum(before[name].n_pruned for name in after)
    return f"{back} of {pruned} pruned positions came back at the commit; the rest of θ is gone"


def _layer(model: Any, name: str) -> RESUModule:
    layer = model.get_submodule(name.rpartition(".")[0])
    assert isinstance(layer, RESUModule)
    return layer


def _enter(layer: RESUModule, start: str | Tensor, config: FinetuneConfig) -> None:
    dtype = None if config.theta_dtype is None else getattr(torch, config.theta_dtype)
    if config.method == "resu":
        layer.enter_resu_mode(config.epsilon, init=start)
    elif config.method == "qresu":
        layer.enter_qresu_mode(config.bits or 4, config.epsilon, theta_dtype=dtype, init=start)
    else:
        layer.enter_qresu_selective_mode(
            config.bits or 4,
            config.epsilon,
            lr=config.step_size,
            weight_decay=config.weight_decay,
            theta_dtype=dtype,
            init=start,
        )


def commit_layer(layer: RESUModule, config: FinetuneConfig) -> SparseMask | None:
    """End the resurrection of a layer: θ joins the weights, and by ``config.commit`` the weakest positions go again.

    The layer is DENSE afterwards, an ordinary layer to whoever saves it.

    Returns:
        The mask that its weight keeps, with as many positions as the one it had, or None (``dense``).
    """
    old = layer.mask
    assert old is not None
    new = None
    if config.commit != "dense":
        scores = layer.effective_weight().detach().abs()
        new = SparseMask(_survivors(scores, old, config))
    if layer.mode is RESUMode.RESU:
        layer.exit_resu_mode(commit=True)
    else:
        layer.exit_qresu_mode(commit=True)
    if new is not None:
        layer.set_mask(new)
        layer.remove_mask()
    return new


def _survivors(scores: Tensor, old: SparseMask, config: FinetuneConfig) -> Tensor:
    if config.commit == "amnesty":
        share = AmnestyConfig(r_start=config.resurrected, r_end=config.resurrected, total_cycles=1)
        return Amnesty(share).tournament(scores, old, old.n_active, 0)
    return get_pattern(config.pattern).select(scores, old.n_active)
