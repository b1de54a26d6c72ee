"""The weights that read what is left, fitted so that less is lost: least squares on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resu.core.layers import is_conv1d_of_transformers
from resu.integrations.shrink.activity import run_batches
from resu.integrations.shrink.families import sites_of
from resu.integrations.shrink.ridge import Sums
from resu.integrations.shrink.weights import weight_of
from resu.pruning.importance.base import wide

__all__ = ["Fitted", "fitted_weights", "put_weights"]

#: A weight ``[out, kept columns]`` and a bias ``[out]`` or None, in the dtype of their layer.
Fitted = tuple[Tensor, Tensor | None]
Batch = Mapping[str, Tensor]
Progress = Callable[[int, int, str], None]
_HELD = 1 << 27  # numbers of second moments at a time: 1 GiB
_DAMPING = 1e-3  # of the mean second moment


def fitted_weights(
    model: Any, units: Mapping[str, Tensor], batches: Sequence[Batch], progress: Progress | None = None
) -> dict[str, Fitted]:
    """Weights and biases for the layers that read the units that stay, to be put there after the removal.

    With ``a`` the input of such a layer as the model is now, ``S`` its columns that stay, and ``C`` the covariance of
    ``a`` over all tokens that are not padding (the second moment, where the layer has no bias), the output ``W a`` is
    approximated best, in the mean square, by ``W' a_S`` with ``W' = (W C[:, S] + λ W[:, S]) (C[S, S] + λI)⁻¹``; the
    bias takes up the difference of the means. It is the reconstruction of ThiNet (Luo et al. 2017, arXiv 1707.06342,
    eq. 6) for all outputs at once, held to the weights as they are by λ, a thousandth of the mean diagonal.

    Args:
        model: Before the removal.
        units: Kept units by site.
        batches: ``input_ids`` and ``attention_mask``, int64 ``[batch, tokens]``.
        progress: Called with (done, total, what).

    Returns:
        ``{name of the reading layer: (weight [out, kept columns], bias [out] or None)}`` in the layer's dtype.
    """
    base = model.base_model
    sites = [site for site in sites_of(model) if site.name in units and len(units[site.name]) < site.count]
    stay = {site.outer: site.columns.of(units[site.name]) for site in sites}
    found: dict[str, Fitted] = {}
    for part in _parts({name: base.get_submodule(name) for name in stay}, stay):
        watched = _Watched(part, stay)
        try:
            with torch.no_grad():
                run_batches(model, batches, watched.begin, progress)
        finally:
            watched.remove()
        for name, layer in part.items():
            before, centred = weight_of(layer), getattr(layer, "bias", None) is not None
            kept = before[:, stay[name].to(before.device)].double()
            weight, bias = watched.sums.pop(name).fit(kept, _DAMPING, centred)
            found[name] = weight.to(before.dtype), bias.to(before.dtype) if centred else None
    return found


def _parts(layers: Mapping[str, nn.Module], stay: Mapping[str, Tensor]) -> Iterator[dict[str, nn.Module]]:
    """Layers whose sums fit into memory together."""
    part: dict[str, nn.Module] = {}
    size = 0
    for name, layer in layers.items():
        own = len(stay[name]) * (len(stay[name]) + len(weight_of(layer)))
        if part and size + own > _HELD:
            yield part
            part, size = {}, 0
        part[name] = layer
        size += own
    if part:
        yield part


class _Watched:
    """Sums of the columns of layers' inputs that stay, and of their outputs, over tokens that are not padding."""

    def __init__(self, layers: Mapping[str, nn.Module], stay: Mapping[str, Tensor]) -> None:
        self.sums = {name: Sums() for name in layers}
        self._real = torch.empty(0)
        self._hooks = [layer.register_forward_hook(self._hook(name, stay[name])) for name, layer in layers.items()]

    def begin(self, batch: Batch) -> None:
        self._real = batch["attention_mask"].bool()

    def _hook(self, name: str, stay: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            real = self._real.to(output.device)
            values = inputs[0].detach()[real].index_select(-1, stay.to(output.device))
            self.sums[name].add(wide(values), wide(output.detach()[real]))

        return add

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def put_weights(model: Any, fitted: Mapping[str, Fitted]) -> None:
    """Put fitted weights in place, after the units they do without are gone."""
    base = model.base_model
    with torch.no_grad():
        for name, (weight, bias) in fitted.items():
            layer = base.get_submodule(name)
            layer.get_parameter("weight").copy_(weight.T if is_conv1d_of_transformers(layer) else weight)
            if bias is not None:
                layer.get_parameter("bias").copy_(bias)
