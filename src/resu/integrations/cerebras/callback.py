"""A ModelZoo callback that lays masks on weights, by tensor operations only."""

# Without `from __future__ import annotations`: ModelZoo makes the YAML's schema of the annotations of `__init__`.

import os
from typing import Any

import torch
from torch import Tensor, nn

from resu.core.io import tensor_checksum
from resu.core.mask_files import read_masks

try:
    from cerebras.modelzoo.trainer.callbacks import Callback
except ImportError:  # a plain class then, with the same hooks, that no ModelZoo finds
    Callback = object

__all__ = ["SparseMaskCallback"]

_STATE = "resu_sparse_mask"
_BUFFER = "resu_mask"


class SparseMaskCallback(Callback):  # type: ignore[misc]
    """Pruned weights are 0 from the start of training, and after each optimizer step where asked.

    In YAML, once this module has been imported::

        callbacks:
          - SparseMaskCallback:
              mask_path: masks.safetensors
              apply_every_step: true

    Masks become buffers beside the weights (``<parameter>_resu_mask``, not saved), so that they are on the device of
    the model and the product is part of the traced step; no Python depends on values. On the wafer itself Cerebras'
    own static sparsity stores pruned weights not at all, which this cannot: see
    :func:`resu.integrations.cerebras.config.sparsity_block`.

    Args:
        mask_path: A file of masks (safetensors, npz or pt) whose names are parameter names of the model, with or
            without the leading ``model.`` of ModelZoo's wrapper.
        apply_every_step: Whether weights are masked after each optimizer step too (sparse to sparse). Without it only
            the starting weights are.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If ``apply_every_step`` is no bool.
        ValueError: When the trainer is set up: if a mask fits no parameter or has another shape, or the file is
            damaged. When a state is loaded: if it was saved with other masks.
    """

    def __init__(self, mask_path: str, apply_every_step: bool = False) -> None:
        if not os.path.isfile(mask_path):
            raise FileNotFoundError(f"there is no file of masks at {mask_path!r}")
        if not isinstance(apply_every_step, bool):
            raise TypeError(f"apply_every_step must be true or false, got {apply_every_step!r}")
        self.mask_path = mask_path
        self.apply_every_step = apply_every_step
        self.places: list[tuple[nn.Module, str]] = []
        self.checksums: dict[str, str] = {}

    def post_setup(self, trainer: Any) -> None:
        """Find the weight of each mask and put the mask beside it."""
        masks, _ = read_masks(self.mask_path)
        parameters = dict(trainer.model.named_parameters())
        self.places = []
        for name, mask in masks.items():
            found = next((n for n in (name, f"model.{name}", name.removeprefix("model.")) if n in parameters), None)
            if found is None:
                some = ", ".join(list(parameters)[:3])
                raise ValueError(
                    f"mask {name!r} of {self.mask_path} fits no parameter of the model ({some}, …); give masks under "
                    "the names of the Cerebras model, not of the checkpoint it was converted from"
                )
            if parameters[found].shape != mask.shape:
                raise ValueError(
                    f"mask {name!r} has shape {tuple(mask.shape)}, the parameter {tuple(parameters[found].shape)}"
                )
            owner, _, attribute = found.rpartition(".")
            module = trainer.model.get_submodule(owner)
            self.checksums[found] = tensor_checksum(mask.packed)
            kept = mask.mask.to(parameters[found].device)
            module.register_buffer(f"{attribute}_{_BUFFER}", kept, persistent=False)
            self.places.append((module, attribute))

    def on_train_start(self, trainer: Any, model: Any, train_dataloader: Any, loop: Any, loop_idx: int) -> None:
        """Mask what the checkpoint has brought."""
        self.apply()

    def on_after_optimizer_step(self, trainer: Any, model: Any, optimizer: Any) -> None:
        """Part of the traced step: masks again, where asked."""
        if self.apply_every_step:
            self.apply()

    def on_save_trainer_state(self, trainer: Any, state_dict: dict[str, Any]) -> None:
        """Which masks they are, so that a restart with others is noticed."""
        state_dict[_STATE] = dict(self.checksums)

    def on_load_trainer_state(self, trainer: Any, state_dict: dict[str, Any]) -> None:
        """Compare the masks with those of the state, if it has any."""
        held = state_dict.get(_STATE)
        if held is None or dict(held) == self.checksums:
            return
        odd = sorted(n for n in {*held, *self.checksums} if held.get(n) != self.checksums.get(n))
        raise ValueError(
            f"the state was saved with other masks than {self.mask_path} holds ({len(odd)} differ, {odd[0]!r} is one); "
            "give the file the run began with"
        )

    @torch.no_grad()
    def apply(self) -> None:
        """Set pruned weights to +0.0, whatever they are."""
        for module, attribute in self.places:
            weight: Tensor = getattr(module, attribute)
            mask: Tensor = getattr(module, f"{attribute}_{_BUFFER}")
            weight.copy_(torch.where(mask, weight, torch.zeros_like(weight)))
