"""Low-rank updates: LoRA as PEFT has it, and sparse LoRA, which keeps the mask."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from resu.core.globs import listing
from resu.core.layers import is_conv1d_of_transformers
from resu.core.mask_files import write_masks, write_safetensors
from resu.integrations.finetune.config import FinetuneConfig
from resu.integrations.finetune.model import LoadedModel
from resu.integrations.finetune.prepared import Masks, Prepared, beside, head_parameters
from resu.pruning.sparse_lora import (
    SparseLoRAConfig,
    adapter_state_dict,
    apply_sparse_lora,
    merge_all_lora_weights,
    merge_loss,
    unload_sparse_lora,
)
from resu.pruning.sparse_lora.kinds import kind_of

__all__ = ["prepare_lora", "prepare_sparse_lora"]


def prepare_lora(loaded: LoadedModel, targets: list[str], config: FinetuneConfig) -> Prepared:
    """LoRA (Hu et al., arXiv 2106.09685) on the target layers, by PEFT; a head is saved with the adapter.

    Raises:
        ImportError: Without PEFT.
        ValueError: If PEFT has no LoRA for a target's layer.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("method 'lora' needs peft: pip install 'resu-torch[peft]'", name=error.name) from error
    heads = sorted({name.rpartition(".")[0] for name in head_parameters(loaded, config)})
    parameters = dict(loaded.model.named_parameters())
    others = [parameters[n] for n in beside(loaded, config) if n.rpartition(".")[0] not in heads]
    modules = [name.rpartition(".")[0] for name in targets]
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # any number
        lora_dropout=config.dropout,
        target_modules=modules,
        modules_to_save=heads or None,
        fan_in_fan_out=all(is_conv1d_of_transformers(loaded.model.get_submodule(name)) for name in modules),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that will go
        model = get_peft_model(loaded.model, settings)
    for parameter in others:  # PEFT freezes all that is not its own
        parameter.requires_grad_(True)

    def finish() -> tuple[Any, Masks]:
        return model.merge_and_unload(), {}

    def save(folder: Path) -> None:
        model.save_pretrained(str(folder))

    return Prepared(model, finish, save_adapter=save)


def prepare_sparse_lora(loaded: LoadedModel, masks: Masks, config: FinetuneConfig) -> Prepared:
    """Sparse LoRA (:mod:`resu.pruning.sparse_lora`) on every masked layer.

    Raises:
        ValueError: If a masked weight is of a kind that has no sparse LoRA.
    """
    cannot = [n for n in masks if kind_of(loaded.model.get_submodule(n.rpartition(".")[0])) is None]
    if cannot:
        raise ValueError(
            f"sparse-lora acts on linear layers and convolutions, not on {listing(cannot, 4)}; name these in exclude "
            "(their zeros stay), or use masked"
        )
    settings = SparseLoRAConfig(
        r=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        target_modules=[name.rpartition(".")[0] for name in masks],
        sparsity_mode=config.lora_mode,
        base_bits=config.bits,
        train_head=beside(loaded, config),
    )
    model = apply_sparse_lora(loaded.model, masks, settings)
    prepared = Prepared(model, lambda: (model, masks))

    def finish() -> tuple[Any, Masks]:
        if lost := max(merge_loss(model).values()):
            prepared.notes.append(
                f"{config.lora_mode}: laying the masks on the merged weights takes away up to {lost:.3g} of a layer's "
                "(Frobenius norm), so what is saved is not quite what was trained; sparse_to_sparse loses nothing"
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "sparse_to_dense: laying", UserWarning)  # the note says it
            merge_all_lora_weights(model)
        return unload_sparse_lora(model), masks

    def save(folder: Path) -> None:
        folder.mkdir()
        write_safetensors(adapter_state_dict(model), folder / "adapter.safetensors", {"format": "pt"})
        write_masks(masks, folder / "masks.safetensors")
        text = json.dumps({**asdict(settings), "scale": settings.scale}, indent=2)
        (folder / "adapter.json").write_text(text + "\n", encoding="utf-8")

    prepared.finish, prepared.save_adapter = finish, save
    return prepared
