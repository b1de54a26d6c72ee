"""The weights that read what is left, fitted so that less is lost: least squares on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resu.core.layers import is_conv1d_of_transformers
from resu.integrations.shrink.activity import run_batches
from resu.integrations.shrink.families import Site, sites_of
from resu.integrations.shrink.weights import weight_of

__all__ = ["fitted_weights", "put_weights"]

Batch = Mapping[str, Tensor]
Progress = Callable[[int, int, str], None]
_HELD = 1 << 27  # numbers of second moments at a time: 1 GiB
_DAMPING = 1e-3  # of the mean second moment


def fitted_weights(
    model: Any, units: Mapping[str, Tensor], batches: Sequence[Batch], progress: Progress | None = None
) -> dict[str, tuple[Tensor, Tensor | None]]:
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
        ``{name of the reading layer: (weight float64 [out, kept columns], bias float64 [out] or None)}``.
    """
    base = model.base_model
    sites = [site for site in sites_of(model) if site.name in units and len(units[site.name]) < site.count]
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    for part in _parts(sites):
        moments = _Moments(base, part)
        try:
            with torch.no_grad():
                run_batches(model, batches, moments.begin, progress)
        finally:
            moments.remove()
        for site in part:
            stay = site.columns.of(units[site.name])
            found[site.outer] = _fit(base.get_submodule(site.outer), stay, *moments.of(site))
    return found


def _parts(sites: Sequence[Site]) -> Iterator[list[Site]]:
    """Sites whose second moments fit into memory together."""
    part: list[Site] = []
    size = 0
    for site in sites:
        own = (site.count * site.columns.size) ** 2
        if part and size + own > _HELD:
            yield part
            part, size = [], 0
        part.append(site)
        size += own
    if part:
        yield part


class _Moments:
    """Sums of the inputs of layers and of their products, over tokens that are not padding."""

    def __init__(self, base: nn.Module, sites: Sequence[Site]) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._tokens, self._real = 0, torch.empty(0)
        self._hooks = [base.get_submodule(s.outer).register_forward_pre_hook(self._hook(s)) for s in sites]

    def begin(self, batch: Batch) -> None:
        self._real = batch["attention_mask"].bool()
        self._tokens += int(self._real.sum())

    def _hook(self, site: Site) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            values = inputs[0].detach()[self._real].float()
            n = values.shape[-1]
            if site.outer not in self._sums:
                self._sums[site.outer] = (
                    torch.zeros(n, dtype=torch.float64, device=values.device),
                    torch.zeros(n, n, dtype=torch.float64, device=values.device),
                )
            first, second = self._sums[site.outer]
            first += values.sum(dim=0)
            second += values.T @ values

        return add

    def of(self, site: Site) -> tuple[Tensor, Tensor]:
        first, second = self._sums.pop(site.outer)
        return first / max(self._tokens, 1), second / max(self._tokens, 1)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _fit(layer: nn.Module, stay: Tensor, mean: Tensor, second: Tensor) -> tuple[Tensor, Tensor | None]:
    weight, bias = weight_of(layer).double(), getattr(layer, "bias", None)
    stay = stay.to(weight.device)
    moment = second if bias is None else second - torch.outer(mean, mean)
    inner = moment[stay][:, stay]
    damping = _DAMPING * float(inner.diagonal().mean().clamp(min=1e-30))
    inner.diagonal().add_(damping)
    # (W C + λ W) in place of W C: what cannot be told from data stays as it is.
    wanted = weight @ moment[:, stay] + damping * weight[:, stay]
    fitted = torch.linalg.solve(inner, wanted.T).T
    if bias is None:
        return fitted, None
    return fitted, bias.detach().double() + weight @ mean - fitted @ mean[stay]


def put_weights(model: Any, fitted: Mapping[str, tuple[Tensor, Tensor | None]]) -> None:
    """Put fitted weights in place, after the units they do without are gone."""
    base = model.base_model
    with torch.no_grad():
        for name, (weight, bias) in fitted.items():
            layer = base.get_submodule(name)
            layer.get_parameter("weight").copy_(weight.T if is_conv1d_of_transformers(layer) else weight)
            if bias is not None:
                layer.get_parameter("bias").copy_(bias)
