"""Whole models: conversion to resurrection layers, and finding what trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

from resu.core.layers import select
from resu.modules.base import RESUModule
from resu.modules.conv import RESUConv2d
from resu.modules.linear import RESULinear
from resu.modules.settings import RESUMode

__all__ = ["convert_to_resu", "get_resu_modules", "resurrection_parameters"]


def convert_to_resu(
    model: nn.Module,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    *,
    sparse_threshold: float | str = "auto",
) -> nn.Module:
    """Replace ``nn.Linear`` and ``nn.Conv2d`` by ``RESULinear`` and ``RESUConv2d``, in place.

    Parameters are shared, not copied, so an optimizer made before stays valid; ties, device, dtype, training
    flag and hooks are kept. Subclasses of ``nn.Linear`` or ``nn.Conv2d`` (other code relies on their inside)
    and layers without a plain ``weight`` Parameter cannot be converted: a selected weight of such a layer stays as
    it is, with a warning, or is an error where ``include`` asks for it.

    Args:
        model: Any module. If it is itself a layer, its replacement is returned.
        include: Globs over parameter or module names, as in ``resu.core.layers.select``.
        exclude: Globs of what to leave out.
        sparse_threshold: Passed to each layer.

    Returns:
        The model.

    Raises:
        ValueError: If a glob matches nothing, nothing that is selected can be converted, or ``include`` names a
            weight that cannot be; the model is unchanged then.

    Warns:
        UserWarning: Once, naming the selected weights that stay as they are, if ``include`` is not given.

    Example:
        >>> model = convert_to_resu(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), exclude="2")
        >>> list(get_resu_modules(model))
        ['0']
    """
    layers = select(model, include, exclude)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    wanted = {names_ for layer in layers.values() for names_ in (layer.name, *layer.ties)}
    possible = {
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, RESUModule) or _is_plain(module)
    }
    left = [name for name, layer in layers.items() if possible.isdisjoint((name, *layer.ties))]
    _tell_of_left(left, len(layers), asked=include is not None)
    replaced: dict[int, RESUModule] = {}
    for module_name, module in list(model.named_modules(remove_duplicate=False)):
        parameter_name = f"{module_name}.weight" if module_name else "weight"
        if parameter_name not in wanted or not _is_plain(module):
            continue
        if id(module) not in replaced:
            new = replaced[id(module)] = _converted(module, sparse_threshold)
            aliases = {
                f"{n}.weight" if n else "weight" for n, m in model.named_modules(remove_duplicate=False) if m is module
            }
            new._shared_with = tuple(n for n in names[id(new.weight)] if n not in aliases)
        if not module_name:
            return replaced[id(module)]
        parent, _, attribute = module_name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, replaced[id(module)])
    return model


def _tell_of_left(left: list[str], selected: int, *, asked: bool) -> None:
    """Say which selected weights stay dense; silence would be a false sparsity."""
    named = ", ".join(left[:8]) + (f", … ({len(left)} in all)" if len(left) > 8 else "")
    if len(left) == selected:
        raise ValueError(
            f"none of the selected weights ({named}) belongs to a plain nn.Linear or nn.Conv2d; "
            "other layer types cannot be converted; Sparsifier prunes them without conversion"
        )
    if not left:
        return
    if asked:
        raise ValueError(
            f"include names what cannot be converted: {named} (not the weight of a plain nn.Linear or nn.Conv2d); "
            "leave it out of include or name it in exclude, or prune with Sparsifier, which needs no conversion"
        )
    warnings.warn(
        f"not converted, so left dense: {named} (not the weight of a plain nn.Linear or nn.Conv2d); name it in "
        "exclude to say that this is meant, or prune with Sparsifier, which needs no conversion",
        stacklevel=3,
    )


def _is_plain(module: nn.Module) -> bool:
    """Whether it can be converted; not with weight_norm and the like."""
    return type(module) in (nn.Linear, nn.Conv2d) and isinstance(module._parameters.get("weight"), nn.Parameter)


def _converted(module: nn.Module, sparse_threshold: float | str) -> RESUModule:
    new: RESUModule
    if isinstance(module, nn.Linear):
        new = RESULinear.from_linear(module, sparse_threshold=sparse_threshold)
    else:
        assert isinstance(module, nn.Conv2d)
        new = RESUConv2d.from_conv(module, sparse_threshold=sparse_threshold)
    new.training = module.training
    for name, value in module.__dict__.items():
        if name.endswith("_hooks") or "_hooks_" in name:
            new.__dict__[name] = value
        else:
            new.__dict__.setdefault(name, value)
    return new


def get_resu_modules(model: nn.Module) -> dict[str, RESUModule]:
    """Resurrection layers by module name (``""`` for the model itself); shared ones once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RESUModule)}


def resurrection_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer has to train in the present modes, each tensor once.

    RESU: ``weight`` (θ lives in it; active weights are held). QRESU: ``theta``. Layers that update θ
    themselves (QRESU_SELECTIVE, and RESU with ``use_selective``, which waits for ``resu_step``) and layers
    without θ add nothing.
    """
    found: dict[int, nn.Parameter] = {}
    for layer in get_resu_modules(model).values():
        if layer.settings.use_selective:
            continue
        if layer.mode is RESUMode.RESU:
            parameter = layer.weight
        elif layer.mode is RESUMode.QRESU:
            parameter = layer._theta_parameter()
        else:
            continue
        assert isinstance(parameter, nn.Parameter)
        found.setdefault(id(parameter), parameter)
    return list(found.values())
