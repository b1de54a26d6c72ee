"""RESU as a tuner of PEFT: which modules it replaces, and with what."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resu.core.mask import SparseMask
from resu.core.resurrection import gather_theta
from resu.integrations.peft.base_tuner import FileCheckingTuner
from resu.integrations.peft.geometry import check_target, choose_mask, rows_and_columns
from resu.integrations.peft.layer import RESULayer
from resu.modules.theta_start import start_theta

__all__ = ["RESUTuner", "first_theta"]


def first_theta(base: Any, mask: SparseMask, config: Any) -> Tensor:
    """θ of a new adapter, ``[p]`` in the dtype of the base weight."""
    rows = rows_and_columns(base, base.weight.detach())
    init = gather_theta(rows, mask) if config.init_theta == "weight" else config.init_theta
    return start_theta(init, rows, mask, config.epsilon, rows.dtype)


class RESUTuner(FileCheckingTuner):
    """What ``get_peft_model(model, RESUAdapterConfig(…))`` puts around a model.

    Several adapters may share a model, each with its own mask and θ over the same base weight.
    """

    prefix = "resu_"
    tuner_layer_cls = RESULayer

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
        base = target.get_base_layer() if isinstance(target, RESULayer) else target
        check_target(base, current_key, parent)
        if isinstance(target, RESULayer) and target.merged:
            raise ValueError(
                f"adapters are merged ({', '.join(target.merged_adapters)}), and a new one starts from the base "
                "weight; call unmerge_adapter() first"
            )
        mask = None if peft_config.stored else choose_mask(base, current_key, peft_config)
        theta = None if mask is None else first_theta(base, mask, peft_config)
        layer = target if isinstance(target, RESULayer) else RESULayer(target)
        layer.add(adapter_name, mask, theta)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
