"""The places of a model where tensors are kept, by name, each place of a tied tensor on its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Slot", "sliced", "slots"]


@dataclass(frozen=True)
class Slot:
    """One place in one module.

    Attributes:
        module_name: Name of the module.
        module: The module.
        attribute: Name of the tensor in it.
        saved: False for a buffer that the state_dict leaves out.
    """

    module_name: str
    module: nn.Module
    attribute: str
    saved: bool = True

    @property
    def name(self) -> str:
        return f"{self.module_name}.{self.attribute}" if self.module_name else self.attribute

    @property
    def tensor(self) -> Tensor:
        tensor = self._kept[self.attribute]
        assert tensor is not None
        return tensor

    def put(self, tensor: Tensor) -> None:
        """Keep this tensor here, as assigning it would: recurrent layers note their weights down in a list."""
        setattr(self.module, self.attribute, tensor)
        if self._kept.get(self.attribute) is not tensor:  # a module with a __setattr__ of its own
            self._kept[self.attribute] = tensor

    @property
    def _kept(self) -> dict[str, Tensor | None]:
        module = self.module
        return module._parameters if self.attribute in module._parameters else module._buffers  # type: ignore[return-value]


def slots(model: nn.Module) -> dict[str, Slot]:
    """Every parameter and buffer by name; tied ones under each of their names.

    Example:
        >>> sorted(slots(nn.BatchNorm1d(2)))
        ['bias', 'num_batches_tracked', 'running_mean', 'running_var', 'weight']
    """
    found: dict[str, Slot] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for kept in (module._parameters, module._buffers):
            for attribute, tensor in kept.items():
                if tensor is not None:
                    saved = attribute not in module._non_persistent_buffers_set
                    slot = Slot(module_name, module, attribute, saved)
                    found[slot.name] = slot
    return found


def sliced(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """A copy of ``tensor`` with only the indices kept of each dimension, contiguous, or channels last where it was."""
    out = tensor
    for dim, indices in kept.items():
        out = out.index_select(dim, indices.to(tensor.device))
    out = out.clone() if out is tensor else out
    for last in (torch.channels_last, torch.channels_last_3d):
        if tensor.ndim == (4 if last is torch.channels_last else 5) and not tensor.is_contiguous():
            out = out.contiguous(memory_format=last) if tensor.is_contiguous(memory_format=last) else out
    return out
