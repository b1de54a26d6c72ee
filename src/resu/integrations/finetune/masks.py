"""Which weights are pruned while a model is fine-tuned: those its source pruned, those a file names, or the weakest."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from resu.core.globs import glob_matches, listing
from resu.core.mask import SparseMask
from resu.core.mask_files import read_masks
from resu.core.pattern import NM, get_pattern
from resu.integrations.finetune.batches import Collator
from resu.integrations.finetune.config import FinetuneConfig
from resu.integrations.finetune.data import Row
from resu.integrations.finetune.model import MASK_FILE, LoadedModel, head_names
from resu.integrations.finetune.prepared import densified
from resu.integrations.hf_names import masks_as_loaded
from resu.pruning.importance import importances
from resu.pruning.mask_generator import MaskGenerator
from resu.pruning.targets import pruning_targets

__all__ = ["carried", "settle_masks", "target_names"]

_BATCH = 8


def target_names(loaded: LoadedModel, config: FinetuneConfig) -> tuple[list[str], dict[str, str]]:
    """Names of the weights that the method acts on, and why the others are left out.

    What :func:`resu.pruning.targets.pruning_targets` takes, without the head of the task and without what is random.
    """
    parameters = dict(loaded.model.named_parameters())
    if config.include:
        targets, skipped = pruning_targets(loaded.model, config.include, config.exclude or None)
        return list(targets), skipped
    heads = loaded.model.get_output_embeddings()
    known = set() if heads is None else {id(p) for p in heads.parameters()}
    trained = {n for n in (*head_names(loaded.model), *loaded.new) if n in parameters}
    matrices = sorted(n for n in trained if parameters[n].ndim >= 2 and id(parameters[n]) not in known)
    targets, skipped = pruning_targets(loaded.model, None, [*config.exclude, *matrices])
    return list(targets), skipped | dict.fromkeys(matrices, "head of the task")


def settle_masks(
    loaded: LoadedModel, config: FinetuneConfig, rows: Sequence[Row], collator: Collator, resumed: Path | None = None
) -> dict[str, SparseMask]:
    """The masks that a method keeps; the model is not changed.

    In this order: those of the run that goes on (``resumed``), of ``config.sparsity``, of ``config.mask``, of the file
    ``masks.safetensors`` beside the source. Names of a file fit with or without the prefix of the model's body. Under
    ``masked``, where all weights train, masks beside the source hold for the weights that are left out too.

    Raises:
        ValueError: If there is none of these, or they do not fit.
    """
    if resumed is not None:
        return read_masks(resumed)[0]
    found = _settled(loaded, config, rows, collator)
    if config.method == "masked" and config.mask in (None, "zeros"):
        return {**_masks_beside(loaded, config), **found}
    return found


def carried(
    loaded: LoadedModel, config: FinetuneConfig, model: Any, masks: Mapping[str, SparseMask], trained: Collection[str]
) -> tuple[dict[str, SparseMask], list[str]]:
    """The masks beside the source that hold on in the result: of weights that were not trained.

    Args:
        loaded: What was loaded.
        config: The settings.
        model: The plain model after training.
        masks: Those of the method.
        trained: Names of the weights that the method acted on.

    Returns:
        ``(masks, notes)``: what to add to ``masks``, and what is to be said of weights that have lost theirs.
    """
    others = {name: mask for name, mask in _masks_beside(loaded, config).items() if name not in masks}
    parameters = dict(model.named_parameters())
    still = set() if config.method in ("full", "masked") else others.keys() - set(trained)
    found = {n: m for n, m in others.items() if n in still and not m.get_pruned(parameters[n].detach().cpu()).any()}
    lost = [name for name in others if name not in found]
    if not lost or densified(config):  # which says it already
        return found, []
    return found, [f"{len(lost)} weights of the sparse source trained without its masks: {listing(lost, 4)}"]


def _masks_beside(loaded: LoadedModel, config: FinetuneConfig) -> dict[str, SparseMask]:
    """All masks beside the source, of weights that this model has."""
    file = config.source / MASK_FILE
    return _fitting(loaded, file) if file.is_file() else {}


def _settled(
    loaded: LoadedModel, config: FinetuneConfig, rows: Sequence[Row], collator: Collator
) -> dict[str, SparseMask]:
    if config.sparsity is not None or _fixed(config):
        return _pruned(loaded, config, rows, collator)
    beside = config.source / MASK_FILE
    if config.mask == "zeros":
        return _zeros(loaded, config)
    if config.mask is None and not beside.is_file():
        raise ValueError(
            f"give a sparsity, or a mask: {config.source} has no {MASK_FILE} beside its weights, and masks are not "
            "read off its zeros unless the mask is 'zeros'"
        )
    return _of_file(loaded, config, beside if config.mask is None else Path(config.mask))


def _fixed(config: FinetuneConfig) -> bool:
    """Whether a pattern says by itself how much is pruned."""
    return config.mask is None and config.pattern is not None and isinstance(get_pattern(config.pattern), NM)


def _pruned(
    loaded: LoadedModel, config: FinetuneConfig, rows: Sequence[Row], collator: Collator
) -> dict[str, SparseMask]:
    names, _ = target_names(loaded, config)
    batches: list[Mapping[str, Tensor]] | None = None
    if importances[config.prune_method].needs:
        chosen = rows[: config.samples]
        batches = [collator(chosen[at : at + _BATCH]) for at in range(0, len(chosen), _BATCH)]
    masks = MaskGenerator(
        loaded.model,
        config.sparsity,
        config.pattern or "unstructured",
        config.prune_method,
        include=names,
        dataloader=batches,
        loss_fn=_loss,
        seed=config.seed,
    ).generate_masks()
    return {name: SparseMask(mask) for name, mask in masks.items()}


def _loss(model: nn.Module, batch: Any) -> Tensor:
    loss = model(**batch).loss
    assert isinstance(loss, Tensor)
    return loss


def _zeros(loaded: LoadedModel, config: FinetuneConfig) -> dict[str, SparseMask]:
    names, _ = target_names(loaded, config)
    parameters = dict(loaded.model.named_parameters())
    masks = {name: SparseMask(parameters[name].detach() != 0) for name in names}
    if not sum(mask.n_pruned for mask in masks.values()):
        raise ValueError(f"{config.source} has no zeros in {listing(names, 4)}; give a sparsity")
    return masks


def _of_file(loaded: LoadedModel, config: FinetuneConfig, file: Path) -> dict[str, SparseMask]:
    found = {name: mask for name, mask in _fitting(loaded, file).items() if _wanted(name, config)}
    if not found:
        names = listing(dict(loaded.model.named_parameters()), 6)
        raise ValueError(f"{file} has no mask of a weight of this model; its weights are {names}")
    return found


def _fitting(loaded: LoadedModel, file: Path) -> dict[str, SparseMask]:
    """The masks of a file by parameter name; those of a head that is made anew belong to the one before."""
    prefix = f"{loaded.model.base_model_prefix}."
    parameters = dict(loaded.model.named_parameters())
    found: dict[str, SparseMask] = {}
    apart: dict[str, SparseMask] = {}
    for stored, mask in read_masks(file)[0].items():
        names = [n for n in (stored, prefix + stored, stored.removeprefix(prefix)) if n in parameters]
        if not names:
            apart[stored] = mask
            continue
        if names[0] in loaded.new:
            continue
        if parameters[names[0]].shape != mask.shape:
            raise ValueError(
                f"the mask {stored!r} of {file} has shape {tuple(mask.shape)}, the weight has "
                f"{tuple(parameters[names[0]].shape)}; the masks are of another model"
            )
        found[names[0]] = mask
    others = [name for name, p in parameters.items() if name not in found and name not in loaded.new and p.ndim > 1]
    return found | (masks_as_loaded(loaded.model, apart, others) if apart else {})


def _wanted(name: str, config: FinetuneConfig) -> bool:
    if any(glob_matches(glob, name) for glob in config.exclude):
        return False
    return not config.include or any(glob_matches(glob, name) for glob in config.include)
