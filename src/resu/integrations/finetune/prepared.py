"""A model made ready for a method: what of it trains, and how it becomes a plain model again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resu.core.enforcement import Constraint
from resu.core.globs import listing
from resu.core.mask import SparseMask
from resu.integrations.finetune.config import FinetuneConfig
from resu.integrations.finetune.model import MASK_FILE, LoadedModel, head_names
from resu.modules.base import RESUModule
from resu.modules.convert import get_resu_modules
from resu.modules.settings import RESUMode

__all__ = ["Masks", "Prepared", "beside", "head_parameters", "let_train", "prepare", "trained_values"]

Masks = dict[str, SparseMask]


@dataclass
class Prepared:
    """A model that is ready to train.

    Attributes:
        model: What the trainer gets; parameters that train require a gradient, the others do not.
        finish: Makes the plain model of it, whose names and layers are those of the source, and says which masks that
            keeps (empty: none).
        self_updating: Layers that move θ by themselves as gradients arrive.
        save_adapter: Writes what was trained into a folder, apart from the weights; None where there is no such thing.
        constraints: Held so that they act.
        notes: What a user should know.
    """

    model: Any
    finish: Callable[[], tuple[Any, Masks]]
    self_updating: list[RESUModule] = field(default_factory=list)
    save_adapter: Callable[[Path], None] | None = None
    constraints: list[Constraint] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def prepare(loaded: LoadedModel, masks: Masks, targets: list[str], config: FinetuneConfig) -> Prepared:
    """Make a model ready for ``config.method``, in place.

    Args:
        loaded: The model as its source has it.
        masks: Of the weights that the method prunes, by parameter name; empty for ``full`` and ``lora``.
        targets: Names of the weights that ``lora`` updates.
        config: The settings.

    Raises:
        ValueError: If a layer is of a kind that the method cannot act on, or what trains is of a dtype that the
            optimizer cannot train.
    """
    prepared = _prepared(loaded, masks, targets, config)
    _check_dtypes(prepared, config)
    if densified(config):
        prepared.notes.append(
            f"the source is sparse and what trains here gets dense: {config.method} "
            + (
                "with commit dense gives the mask up; commit sparse or amnesty keeps its count"
                if config.has_theta
                else "knows no mask; masked and sparse-lora keep it"
            )
        )
    return prepared


def _check_dtypes(prepared: Prepared, config: FinetuneConfig) -> None:
    """Refuse torch's AdamW over float16, which works in the dtype of the weights: a step would divide by 0."""
    own = {id(layer.theta) for layer in prepared.self_updating}
    parameters = prepared.model.named_parameters()
    half = [n for n, p in parameters if p.requires_grad and p.dtype is torch.float16 and id(p) not in own]
    if half and config.optimizer == "adamw":
        raise ValueError(
            f"adamw cannot train values of float16 ({listing(half, 2)}): its ε of 1e-8 is 0 there, and a step divides "
            "by 0; give the dtype bfloat16 or float32, or the optimizer adamw8bit, whose steps are made in float32"
        )


def densified(config: FinetuneConfig) -> bool:
    """Whether a source that brings masks loses them."""
    return (config.source / MASK_FILE).is_file() and (
        not config.masks or (config.has_theta and config.commit == "dense")
    )


def _prepared(loaded: LoadedModel, masks: Masks, targets: list[str], config: FinetuneConfig) -> Prepared:
    if config.method in ("full", "masked"):
        return _whole(loaded, masks)
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(False)
    from resu.integrations.finetune.adapters import prepare_lora, prepare_sparse_lora

    if config.method == "lora":
        return prepare_lora(loaded, targets, config)
    heads = {name: masks[name] for name in beside(loaded, config) if name in masks}
    others = {name: mask for name, mask in masks.items() if name not in heads}
    if not others:
        raise ValueError(
            f"only {listing(heads)} is to be pruned, which trains whole beside a method; use masked, or name more"
        )
    if config.has_theta:
        from resu.integrations.finetune.theta import prepare_theta

        prepared = prepare_theta(loaded, others, config)
    else:
        prepared = prepare_sparse_lora(loaded, others, config)
    return _with_heads(prepared, heads)


def _with_heads(prepared: Prepared, heads: Masks) -> Prepared:
    """Heads train whole; those that bring masks keep their zeros meanwhile."""
    held = _held(prepared.model, heads)
    finish = prepared.finish
    prepared.constraints += held

    def finish_all() -> tuple[Any, Masks]:
        model, kept = finish()
        for constraint in held:
            constraint.remove()
        return model, {**kept, **heads}

    if heads:
        prepared.finish = finish_all
    return prepared


def _held(model: nn.Module, masks: Masks) -> list[Constraint]:
    parameters = dict(model.named_parameters())
    held = [Constraint(parameters[name], mask) for name, mask in masks.items()]
    for constraint in held:
        constraint.enforce()
    return held


def _whole(loaded: LoadedModel, masks: Masks) -> Prepared:
    """Every weight trains; pruned ones stay 0."""
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(True)
    held = _held(loaded.model, masks)

    def finish() -> tuple[Any, Masks]:
        for constraint in held:
            constraint.remove()
        return loaded.model, masks

    return Prepared(loaded.model, finish, constraints=held)


def head_parameters(loaded: LoadedModel, config: FinetuneConfig) -> list[str]:
    """Names of what always trains: the head of a classification, and what the source has no weights for."""
    heads = set(loaded.new)
    if config.task == "classification":
        heads |= set(head_names(loaded.model))
    return sorted(heads)


def beside(loaded: LoadedModel, config: FinetuneConfig) -> list[str]:
    """Names of what trains beside a method's own: :func:`head_parameters`, and what ``config.train_*`` ask for."""
    found = dict(loaded.model.named_parameters(remove_duplicate=False))
    wanted = set(head_parameters(loaded, config))
    if config.train_head:
        output = loaded.model.get_output_embeddings()
        ids = {id(p) for p in output.parameters()} if output is not None else set()
        wanted |= {name for name, p in found.items() if id(p) in ids} | set(head_names(loaded.model))
    for name, module in loaded.model.named_modules():
        norm = "norm" in type(module).__name__.lower()
        for attribute, _ in module.named_parameters(recurse=False):
            if (config.train_norms and norm) or (config.train_biases and attribute.endswith("bias")):
                wanted.add(f"{name}.{attribute}" if name else attribute)
    return [name for name, _ in loaded.model.named_parameters() if name in wanted]


def let_train(model: nn.Module, names: list[str]) -> None:
    """Have these parameters require a gradient."""
    parameters = dict(model.named_parameters())
    for name in names:
        parameters[name].requires_grad_(True)


def trained_values(prepared: Prepared) -> int:
    """How many values train: of a weight with a mask, those that are free to move."""
    model = prepared.model
    total: int = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = [layer.mask for layer in get_resu_modules(model).values() if layer.mode is RESUMode.RESU]
    held: int = sum(mask.n_active for mask in frozen if mask is not None)
    zeros: int = sum(constraint.mask.n_pruned for constraint in prepared.constraints)
    return total - held - zeros
