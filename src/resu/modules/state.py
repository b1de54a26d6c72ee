"""Reading a ``state_dict`` into a resurrection layer: everything is checked before anything is changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resu.core.mask import SparseMask
from resu.modules.settings import RESUMode, Settings

if TYPE_CHECKING:
    from resu.modules.held import HeldWeight

__all__ = ["SETTINGS", "finish", "prepare"]

SETTINGS = "resu_settings"
_OWN = ("bitmask", "codes", "scale", "zero", "theta", "theta_m", "theta_v")


def _needed(settings: Settings) -> list[str]:
    names = ["bitmask"]
    names += ["codes", "scale", "zero", "theta"] if settings.mode.quantized else ["weight"]
    return names + (["theta_m", "theta_v"] if settings.use_selective else [])


def _problem(layer: HeldWeight, settings: Settings, given: dict[str, Any]) -> str | None:
    """What is wrong with the tensors of one layer, or None."""
    needed = _needed(settings)
    absent = [name for name in needed if not isinstance(given.get(name), Tensor)]
    if absent:
        return f"mode {settings.mode.name} needs {', '.join(needed)}; missing: {', '.join(absent)}"
    shape = layer.weight_shape
    try:
        mask = SparseMask.from_packed(given["bitmask"], shape)
    except ValueError as error:
        return str(error)
    rows = mask.packed.shape[0] if settings.qscheme == "per_channel" else 1
    code_bytes = mask.n_active if settings.bits == 8 else (mask.n_active + 1) // 2
    theta = (mask.n_pruned,)
    expected: dict[str, tuple[int, ...]] = {
        "weight": tuple(shape),
        "codes": (code_bytes,),
        "scale": (rows,),
        "zero": (rows,),
        "theta": theta,
        "theta_m": theta,
        "theta_v": theta,
    }
    for name in needed[1:]:
        if tuple(given[name].shape) != expected[name]:
            return (
                f"{name} has shape {tuple(given[name].shape)}, expected {expected[name]} for a weight of "
                f"shape {tuple(shape)} with {mask.n_active} active positions"
            )
    if settings.mode.quantized and given["codes"].dtype != torch.uint8:
        return f"codes have dtype {given['codes'].dtype}, expected torch.uint8"
    bias = given.get("bias")
    if isinstance(bias, Tensor) and layer.bias is not None and bias.shape != layer.bias.shape:
        return f"bias has shape {tuple(bias.shape)}, expected {tuple(layer.bias.shape)}"
    return None


def prepare(layer: HeldWeight, state_dict: dict[str, Any], prefix: str, errors: list[str]) -> dict[str, Any] | None:
    """Bring ``layer`` into the mode of ``state_dict``, ready to receive its tensors.

    Returns:
        The entries for ``nn.Module`` to load, or None if there were errors (appended to ``errors``; the layer
        is then unchanged).
    """
    given = {
        key[len(prefix) :]: value
        for key, value in state_dict.items()
        if key.startswith(prefix) and "." not in key[len(prefix) :]
    }
    packed = given.pop(SETTINGS, None)
    rest = {prefix + name: value for name, value in given.items()}
    where = prefix.rstrip(".") or "layer"
    if packed is None:
        stray = [name for name in _OWN if name in given]
        if stray:
            errors.append(f"{where}: holds {', '.join(stray)} but not {SETTINGS}; the checkpoint is incomplete")
            return None
        weight = given.get("weight")
        if not isinstance(weight, Tensor):  # nothing, or a bias alone: torch reports what is missing
            return rest
        if weight.shape != layer.weight_shape:
            errors.append(f"{where}: weight has shape {tuple(weight.shape)}, expected {tuple(layer.weight_shape)}")
            return None
        if layer.mode is not RESUMode.DENSE:  # a plain layer's checkpoint makes it a plain layer
            _to_dense(layer)
        return rest
    try:
        settings = Settings.from_tensor(packed)
        problem = _problem(layer, settings, given)
    except (ValueError, TypeError, AttributeError) as error:
        problem = f"{SETTINGS}: {error}"
    if problem is None and settings.mode.quantized and layer._shared_with:
        problem = f"its weight is shared with {', '.join(layer._shared_with)}; mode {settings.mode.name} frees it"
    if problem is not None:
        errors.append(f"{where}: {problem}")
        return None
    _enter(layer, settings, given)
    return rest


def _to_dense(layer: HeldWeight) -> None:
    if layer.mode.quantized:
        layer._release_theta()
        layer._take_up_weight(_blank(layer))
    elif layer.mode is RESUMode.RESU:
        layer.weight.requires_grad_(layer._waiting_trains)
    layer._become_dense()


def _blank(layer: HeldWeight) -> Tensor:
    waiting = layer._waiting[0]
    return torch.empty(layer.weight_shape, dtype=waiting.dtype, device=waiting.device)


def _enter(layer: HeldWeight, settings: Settings, given: dict[str, Any]) -> None:
    """Allocate what the mode holds; tensors that exist already with the right shape stay the same objects."""
    device = (layer._waiting[0] if layer._waiting else layer.weight).device
    bits = given["bitmask"].detach().to(device, copy=True)
    mask = SparseMask.from_packed(bits, layer.weight_shape)
    theta = layer.theta
    if not settings.mode.quantized:
        if layer.mode is not RESUMode.DENSE:
            _to_dense(layer)
        layer._settings, layer._sparse_mask, layer.bitmask = settings, mask, mask.packed
        if settings.mode is RESUMode.RESU:
            layer._waiting_trains = layer.weight.requires_grad
            layer.weight.requires_grad_(True)
            layer.weight.grad = None
    else:
        codes, scale, zero = (given[name].detach().to(device, copy=True) for name in ("codes", "scale", "zero"))
        fresh = torch.empty(mask.n_pruned, dtype=settings.theta_dtype, device=device)
        layer._offsets = None
        layer._install_quantized(settings, mask, codes, scale, zero, fresh)
        if theta is not None and theta.shape == fresh.shape and theta.dtype == fresh.dtype:
            layer._leave()
            layer.theta = theta  # an optimizer may own it
    if settings.use_selective:
        layer._make_averages(torch.empty(mask.n_pruned, dtype=settings.theta_dtype, device=device))


def finish(layer: HeldWeight) -> None:
    """After the tensors have arrived: make what is derived from them."""
    if layer._constraint is not None:
        layer._constraint.remove()
    if layer._theta_hook is not None:
        layer._theta_hook.remove()
    layer._constraint = layer._theta_hook = layer._checksum = layer._product = None
    mask = layer.mask
    if mask is None:
        return
    if layer.mode is RESUMode.SPARSE:
        mask.apply_(layer.weight)
    layer.bitmask = mask.packed
    layer._rebuild()
