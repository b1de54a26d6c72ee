"""What the tuners share: default targets, checked adapter files, and no adapter names per sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from resu.integrations.peft.loading import prepare

__all__ = ["FileCheckingTuner"]


class FileCheckingTuner(BaseTuner):
    """A tuner whose layers make room for what an adapter file holds, and refuse one that is not theirs.

    Without ``target_modules`` its targets are those that PEFT knows for LoRA on the architecture.
    """

    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        super()._replace_module(parent, child_name, new_module, child)
        if isinstance(parent, nn.TransformerEncoderLayer) and isinstance(new_module, self.tuner_layer_cls):
            # In inference it multiplies with the weights itself (its fast path), unless something waits for the call.
            new_module.register_forward_pre_hook(_called)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        prepare(model, cls.tuner_layer_cls, adapter_name, state_dict)
        mapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return mapped

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **options: Any) -> Iterator[None]:
        # PEFT drops the argument after this, so it would be ignored in silence.
        if options.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names (another adapter for each sample of a batch) is not known to this method; run the model "
                "once for each adapter, with set_adapter()"
            )
        yield


def _called(module: nn.Module, args: Any) -> None:
    """Does nothing: that it is there is what counts."""
