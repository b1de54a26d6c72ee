"""The sizes that layers note down beside their tensors, repaired after indices are taken out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.weight_norm import WeightNorm

from resu.core.layers import is_conv1d_of_transformers
from resu.pruning.structured.slots import Slot

__all__ = ["is_direction", "recomputed", "remaining_groups", "repaired_attributes", "set_attribute"]

_Cut = Mapping[int, Tensor]
_MISSING = object()


def set_attribute(module: nn.Module, attribute: str, value: Any) -> Callable[[], None]:
    """Set an attribute; what is returned puts the former value back."""
    before = module.__dict__.get(attribute, _MISSING)
    setattr(module, attribute, value)

    def back() -> None:
        if before is _MISSING:
            module.__dict__.pop(attribute, None)
        else:
            setattr(module, attribute, before)

    return back


def is_direction(slot: Slot) -> bool:
    """Whether a tensor is the direction of a weight in weight norm, in either form of torch's."""
    module = slot.module
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        return slot.attribute == "original1" and isinstance(module[0], _WeightNorm)
    hooks = module._forward_pre_hooks.values()
    return any(isinstance(hook, WeightNorm) and slot.attribute == f"{hook.name}_v" for hook in hooks)


def recomputed(module: nn.Module) -> list[Callable[[], None]]:
    """Compute weights anew that hooks of ``torch.nn.utils`` derive from parameters; what puts the former ones back."""
    back = []
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            back.append(set_attribute(module, hook.name, hook.compute_weight(module)))
        elif isinstance(hook, BasePruningMethod):
            back.append(set_attribute(module, hook._tensor_name, hook.apply_mask(module)))
    return back


def repaired_attributes(model: nn.Module, cut: Mapping[str, _Cut]) -> dict[str, dict[str, Any]]:
    """``{module name: {attribute: value}}`` of the layers of ``torch.nn`` whose tensors are cut.

    Args:
        model: Not yet cut.
        cut: ``{tensor name: {dimension: indices kept}}``, tied tensors under all their names.

    Raises:
        ValueError: If a layer cannot be smaller in that way.
    """
    by_module: dict[str, dict[str, _Cut]] = {}
    for name, kept in cut.items():
        module_name, _, attribute = name.rpartition(".")
        if ".parametrizations." in f".{name}":  # layer.parametrizations.weight.original1
            head, _, tail = f".{name}".rpartition(".parametrizations.")
            module_name, attribute = head.lstrip("."), tail.partition(".")[0]
        known = by_module.setdefault(module_name, {})
        attribute = {"weight_v": "weight", "weight_orig": "weight"}.get(attribute, attribute)
        known[attribute] = {**known.get(attribute, {}), **kept} if len(kept) or attribute not in known else kept
    result: dict[str, dict[str, Any]] = {}
    for module_name, tensors in by_module.items():
        module = model.get_submodule(module_name)
        values = _values(module, tensors, module_name)
        if values:
            result[module_name] = values
    return result


def _values(module: nn.Module, cut: Mapping[str, _Cut], name: str) -> dict[str, Any]:
    weight: _Cut = cut.get("weight", {})

    def size(tensor: str, dim: int) -> int | None:
        kept = cut.get(tensor, {}).get(dim)
        return None if kept is None else len(kept)

    if isinstance(module, _ConvNd):
        return _convolution(module, weight, name)
    if isinstance(module, nn.Linear):
        return _set(out_features=size("weight", 0), in_features=size("weight", 1))
    if isinstance(module, nn.Bilinear):
        return _set(out_features=size("weight", 0), in1_features=size("weight", 1), in2_features=size("weight", 2))
    if is_conv1d_of_transformers(module):
        return _set(nx=size("weight", 0) if hasattr(module, "nx") else None, nf=size("weight", 1))
    if isinstance(module, _NormBase):
        kept = next((size(t, 0) for t in ("weight", "bias", "running_mean", "running_var") if size(t, 0)), None)
        return _set(num_features=kept)
    if isinstance(module, nn.GroupNorm):
        if 0 not in weight:
            return {}
        groups = remaining_groups(weight[0], module.num_channels, module.num_groups, name, whole=True)
        return {"num_channels": len(weight[0]), "num_groups": groups}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        if not weight:
            return {}
        shape = tuple(len(weight[d]) if d in weight else n for d, n in enumerate(module.normalized_shape))
        return {"normalized_shape": shape}
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return _set(num_embeddings=size("weight", 0), embedding_dim=size("weight", 1))
    if isinstance(module, nn.PReLU):
        return _set(num_parameters=size("weight", 0))
    if isinstance(module, nn.RNNBase):
        odd = [t for t, kept in cut.items() if not t.startswith("weight_ih_l0") or set(kept) - {1}]
        if odd:
            raise ValueError(f"only the inputs of {type(module).__name__} {name!r} can be fewer, not {', '.join(odd)}")
        return _set(input_size=size("weight_ih_l0", 1))
    if isinstance(module, nn.MultiheadAttention):
        raise ValueError(
            f"nn.MultiheadAttention {name!r} takes the size of its heads from its input, and cannot shrink"
        )
    return {}


def _set(**sizes: int | None) -> dict[str, Any]:
    return {name: value for name, value in sizes.items() if value is not None}


def _convolution(module: _ConvNd, weight: _Cut, name: str) -> dict[str, Any]:
    """``[out, in / groups, …]``, or ``[in, out / groups, …]`` where transposed."""
    first, second = (
        ("in_channels", "out_channels") if isinstance(module, _ConvTransposeNd) else ("out_channels", "in_channels")
    )
    groups = module.groups
    if 0 in weight and groups > 1:
        groups = remaining_groups(weight[0], getattr(module, first), groups, name)
    values: dict[str, Any] = {"groups": groups} if groups != module.groups else {}
    if 0 in weight:
        values[first] = len(weight[0])
    per_group = len(weight[1]) if 1 in weight else getattr(module, second) // module.groups
    if per_group * groups != getattr(module, second):
        values[second] = per_group * groups
    return values


def remaining_groups(kept: Tensor, channels: int, groups: int, name: str, *, whole: bool = False) -> int:
    """How many groups are left: all, where each keeps equally many channels; fewer, where some go as a whole.

    Raises:
        ValueError: If it is neither (or the first, and groups must stay ``whole``).

    Example:
        >>> remaining_groups(torch.tensor([0, 1, 4, 5]), 8, 4, "conv")
        2
        >>> remaining_groups(torch.tensor([0, 2, 4, 6]), 8, 4, "conv")
        4
    """
    each = channels // groups
    counts = torch.bincount(kept // each, minlength=groups)
    if bool(((counts == each) | (counts == 0)).all()):
        return int((counts > 0).sum())
    if not whole and bool((counts == counts[0]).all()):
        return groups
    raise ValueError(
        f"{name!r} has {groups} groups of {each} channels; a removal must leave each "
        f"{'whole or out' if whole else 'whole, out, or equally many channels of all'}, not {counts.tolist()[:8]}"
    )
