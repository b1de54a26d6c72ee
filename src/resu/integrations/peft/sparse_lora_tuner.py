"""Sparse LoRA as a tuner of PEFT."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from resu.integrations.peft.geometry import check_target, choose_mask
from resu.integrations.peft.loading import prepare
from resu.integrations.peft.sparse_lora_layer import SparseLoRALayer

__all__ = ["SparseLoRATuner"]


class SparseLoRATuner(BaseTuner):
    """What ``get_peft_model(model, SparseLoRAAdapterConfig(…))`` puts around a pruned model.

    Several adapters may share a model; on one layer they have one mask and one mode.
    """

    prefix = "sparse_lora_"
    tuner_layer_cls = SparseLoRALayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

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
        check_target(base, current_key)
        mask = None if peft_config.stored else choose_mask(base, current_key, peft_config)
        layer = target if isinstance(target, SparseLoRALayer) else SparseLoRALayer(target)
        layer.add(adapter_name, mask, peft_config, current_key)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        prepare(model, cls.tuner_layer_cls, adapter_name, state_dict)
        mapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return mapped
