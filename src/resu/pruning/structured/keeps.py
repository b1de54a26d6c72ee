"""What to keep of layers, said by layer: outputs and inputs in place of tensors and dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.optim import Optimizer

from resu.core.layers import is_conv1d_of_transformers
from resu.pruning.structured.removal import Removal, shrink_tensors

__all__ = ["Keep", "shrink_modules", "slices_of"]


@dataclass(frozen=True)
class Keep:
    """Indices of one layer to keep, ascending; None: all.

    Attributes:
        out: Of its outputs: rows of a linear layer, filters of a convolution, features of a norm or an embedding.
        in_: Of its inputs.
    """

    out: Tensor | None = None
    in_: Tensor | None = None


def slices_of(model: nn.Module, keeps: Mapping[str, Keep]) -> dict[str, dict[int, Tensor]]:
    """``{tensor name: {dimension: indices kept}}``, as :func:`resu.pruning.structured.removal.shrink_tensors` takes it.

    Args:
        model: Any module.
        keeps: ``{module name: Keep}`` of linear layers, convolutions, norms, embeddings.

    Raises:
        TypeError: On a module of another type.
        ValueError: If a norm or an embedding is to keep inputs, or a grouped convolution is said by its inputs.

    Example:
        >>> import torch
        >>> sorted(slices_of(nn.Sequential(nn.Linear(4, 3)), {"0": Keep(out=torch.tensor([0, 2]))}))
        ['0.bias', '0.weight']
    """
    result: dict[str, dict[int, Tensor]] = {}
    for name, keep in keeps.items():
        module = model.get_submodule(name)
        prefix = f"{name}." if name else ""
        for attribute, dim, indices in _places(module, keep, name):
            if indices is not None and getattr(module, attribute, None) is not None:
                result.setdefault(prefix + attribute, {})[dim] = indices
    return result


def _places(module: nn.Module, keep: Keep, name: str) -> list[tuple[str, int, Tensor | None]]:
    if isinstance(module, nn.Linear):
        return [("weight", 0, keep.out), ("bias", 0, keep.out), ("weight", 1, keep.in_)]
    if is_conv1d_of_transformers(module):
        return [("weight", 1, keep.out), ("bias", 0, keep.out), ("weight", 0, keep.in_)]
    if isinstance(module, _ConvNd):
        turned = isinstance(module, _ConvTransposeNd)
        if module.groups > 1 and (turned or keep.in_ is not None):
            raise ValueError(f"{name!r} has {module.groups} groups: say by slices of its weight what it keeps")
        return [("weight", int(turned), keep.out), ("bias", 0, keep.out), ("weight", int(not turned), keep.in_)]
    if keep.in_ is not None:
        raise ValueError(f"{type(module).__name__} {name!r} has no inputs apart from its outputs; give out only")
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return [("weight", 1, keep.out)]
    if isinstance(module, (_NormBase, nn.LayerNorm, nn.GroupNorm)) or "norm" in type(module).__name__.lower():
        return [(attribute, 0, keep.out) for attribute in ("weight", "bias", "running_mean", "running_var")]
    raise TypeError(f"{name!r} is a {type(module).__name__}; say by slices of its tensors what it keeps")


def shrink_modules(model: nn.Module, keeps: Mapping[str, Keep], optimizer: Optimizer | None = None) -> Removal:
    """:func:`resu.pruning.structured.removal.shrink_tensors`, said by layer.

    Args:
        model: Any module; changed in place.
        keeps: ``{module name: Keep}``.
        optimizer: Whose groups and state follow.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
        >>> kept = torch.tensor([0, 3, 5])
        >>> removal = shrink_modules(model, {"0": Keep(out=kept), "1": Keep(out=kept), "2": Keep(in_=kept)})
        >>> model(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 4, 4, 4])
        >>> removal.undo()
        >>> model[0].out_channels
        8
    """
    return shrink_tensors(model, slices_of(model, keeps), optimizer)
