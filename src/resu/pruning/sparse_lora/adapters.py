"""Adapters of a whole model by name: which act, which go, and what is saved of one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from resu.core.globs import listing
from resu.pruning.sparse_lora.apply import get_lora_layers
from resu.pruning.sparse_lora.beside import parameters_beside
from resu.pruning.sparse_lora.layer import SparseLoRALayer

__all__ = [
    "adapter_names",
    "adapter_state_dict",
    "delete_adapter",
    "disabled_adapters",
    "enable_adapters",
    "load_adapter_state_dict",
    "set_adapters",
]


def adapter_names(model: nn.Module) -> list[str]:
    """Names of all adapters, in the order in which they came."""
    return list(dict.fromkeys(name for layer in get_lora_layers(model).values() for name in layer.configs))


def _having(model: nn.Module, adapter: str) -> dict[str, SparseLoRALayer]:
    layers = {name: layer for name, layer in get_lora_layers(model).items() if adapter in layer.configs}
    if not layers:
        raise ValueError(f"there is no adapter {adapter!r}; there are: {listing(adapter_names(model)) or 'none'}")
    return layers


def set_adapters(model: nn.Module, adapters: str | Iterable[str]) -> None:
    """Say which adapters act, added up, and train. Merged ones are taken out of the weights first.

    Raises:
        ValueError: If there is no such adapter; nothing has changed then.
    """
    names = [adapters] if isinstance(adapters, str) else list(adapters)
    for name in names:
        _having(model, name)
    for layer in get_lora_layers(model).values():
        layer.set_active(name for name in names if name in layer.configs)


def enable_adapters(model: nn.Module, enabled: bool = True) -> None:
    """Let the active adapters act, or not: the model is then its sparse base, to the last bit."""
    for layer in get_lora_layers(model).values():
        layer.enable(enabled)


@contextmanager
def disabled_adapters(model: nn.Module) -> Iterator[None]:
    """The sparse base alone, for a time. Merged adapters are taken out of the weights, and acting again afterwards."""
    before = {name: (layer.enabled, layer.merged, layer._preserved) for name, layer in get_lora_layers(model).items()}
    enable_adapters(model, False)
    try:
        yield
    finally:
        for name, layer in get_lora_layers(model).items():
            enabled, merged, preserved = before.get(name, (True, (), True))
            layer.enable(enabled)
            if merged:
                layer.merge(merged, preserve_sparsity=preserved)


def delete_adapter(model: nn.Module, adapter: str) -> None:
    """Remove an adapter from all layers; what trained beside it (norms, biases, a head) stays as it is.

    Raises:
        ValueError: If there is no such adapter.
    """
    for layer in _having(model, adapter).values():
        layer.delete_adapter(adapter)


def adapter_state_dict(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """What one adapter has learnt: its factors, and what trained beside it. Detached, not copied.

    Names are those of the plain model: ``"fc1.lora_A"``, ``"fc1.lora_B"`` of a layer ``fc1``, and parameter names of
    norms, biases and heads that the adapter's config trains. It belongs to this base and these masks.

    Raises:
        ValueError: If there is no such adapter.
    """
    layers = _having(model, adapter)
    state = {}
    for name, layer in layers.items():
        for kind in ("lora_A", "lora_B"):
            state[name.removesuffix("weight") + kind] = getattr(layer, kind)[adapter].detach()
    config = next(iter(layers.values())).configs[adapter]
    return state | {name: p.detach() for name, p in parameters_beside(model, config).items()}


@torch.no_grad()
def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor], adapter: str = "default") -> None:
    """Read what :func:`adapter_state_dict` gave into an adapter that was applied with the same config.

    Merged adapters are taken out of the weights first.

    Raises:
        ValueError: If a name is missing or unknown, or a shape differs; nothing has changed then.
    """
    own = adapter_state_dict(model, adapter)
    missing, unknown = [n for n in own if n not in state], [n for n in state if n not in own]
    if missing or unknown:
        raise ValueError(
            f"the state is not one of adapter {adapter!r}: missing {listing(missing, 5) or 'nothing'}; unknown "
            f"{listing(unknown, 5) or 'nothing'}; apply the adapter with the config it was trained with"
        )
    for name, target in own.items():
        if state[name].shape != target.shape:
            raise ValueError(f"{name!r} has shape {tuple(state[name].shape)}, expected {tuple(target.shape)}")
    for layer in get_lora_layers(model).values():
        layer.unmerge()
    for name, target in own.items():
        target.copy_(state[name])
