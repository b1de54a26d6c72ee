"""Sparse LoRA as a tuner of PEFT."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from resu.integrations.peft.base_tuner import FileCheckingTuner
from resu.integrations.peft.geometry import check_target, choose_mask
from resu.integrations.peft.sparse_lora_layer import SparseLoRALayer

__all__ = ["SparseLoRATuner"]


class SparseLoRATuner(FileCheckingTuner):
    """What ``get_peft_model(model, SparseLoRAAdapterConfig(…))`` puts around a pruned model.

    Several adapters may share a model; on one layer they have one mask and one mode.
    """

    prefix = "sparse_lora_"
    tuner_layer_cls = SparseLoRALayer

    @torch.no_grad()
    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, SparseLoRALayer) else target
        check_target(base, current_key, parent)
        mask = None if peft_config.stored else choose_mask(base, current_key, peft_config)
        layer = target if isinstance(target, SparseLoRALayer) else SparseLoRALayer(target)
        layer.add(adapter_name, mask, peft_config, current_key)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
