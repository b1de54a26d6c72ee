"""QRESU as a tuner of PEFT: which modules it replaces, with what, and what it refuses."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from peft import PeftConfig
from torch import nn

from resu.core.layers import every_weight
from resu.integrations.peft.base_tuner import FileCheckingTuner
from resu.integrations.peft.geometry import check_target, choose_mask
from resu.integrations.peft.quantized_layer import QRESULayer
from resu.integrations.peft.tuner import first_theta

__all__ = ["QRESUTuner"]


class QRESUTuner(FileCheckingTuner):
    """What ``get_peft_model(model, QRESUAdapterConfig(…))`` puts around a model.

    It frees the weights of its targets, so what needs them is refused with an error: a second adapter, taking the
    adapter off (``disable_adapter``, ``delete_adapter``, ``unload``), and targets whose weight is tied to another
    module.
    """

    prefix = "qresu_"
    tuner_layer_cls = QRESULayer

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        if len(self.peft_config) > 1:
            raise ValueError(
                "QRESU takes one adapter per model: the weights that a second one would start from are freed. Use RESU "
                "for several, or merge_and_unload() first"
            )

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        # Looked up once, for all targets.
        self._ties = {id(layer.weight): (layer.name, *layer.ties) for layer in every_weight(model).values()}

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
        check_target(target, current_key, parent)
        names = self._ties.get(id(target.weight), ())
        if len(names) > 1:
            raise ValueError(
                f"the weight of target module {current_key!r} is shared ({', '.join(names)}), and QRESU frees it; name "
                "the module in exclude_modules, or use RESU"
            )
        mask = None if peft_config.stored else choose_mask(target, current_key, peft_config)
        theta = None if mask is None else first_theta(target, mask, peft_config)
        layer = QRESULayer(target, peft_config.bits, peft_config.qscheme)
        layer.add(adapter_name, mask, theta)
        self._replace_module(parent, target_name, layer, target)

    def unload(self) -> NoReturn:
        """Refused: the base weights are freed.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            "QRESU cannot be unloaded without merging: the base weights were quantized and freed. merge_and_unload() "
            "gives the dense model that was trained; load the base model again for the other"
        )

    def delete_adapter(self, adapter_name: str) -> NoReturn:
        """Refused: the layers would have no weight.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            f"adapter {adapter_name!r} cannot be deleted: QRESU freed the base weights, and the layers would have "
            "none. merge_and_unload() gives a dense model"
        )
