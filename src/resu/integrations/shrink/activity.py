"""Scores from what passes through a model: what each unit adds to the residual stream, what each block changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resu.integrations.shrink.families import Site, blocks_of
from resu.integrations.shrink.weights import weight_of
from resu.pruning.importance.base import wide
from resu.pruning.statistics import eager, undisturbed

__all__ = ["block_influences", "output_energies", "run_batches"]

Batch = Mapping[str, Tensor]
Progress = Callable[[int, int, str], None]


def output_energies(
    model: Any, sites: Sequence[Site], batches: Sequence[Batch], progress: Progress | None = None
) -> dict[str, Tensor]:
    """The mean square of what a unit adds to the residual stream, over all tokens but padding.

    With ``a_u`` the part of the reading layer's input that belongs to unit ``u`` and ``W_u`` its columns of the
    weight: ``E‖W_u a_u‖² = tr(W_u E[a_u a_uᵀ] W_uᵀ)``. Of a neuron that is ``E[a²]·‖w‖²``, Wanda's product (Sun et al.
    2023, arXiv 2306.11695, eq. 1) over a whole column.

    Returns:
        ``{site name: float64 [units]}``.
    """
    base, moments = model.base_model, _Moments(sites)
    hooks = [base.get_submodule(site.outer).register_forward_pre_hook(moments.hook(site)) for site in sites]
    try:
        with torch.no_grad():
            run_batches(model, batches, moments.begin, progress)
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for site in sites:
        weight = weight_of(base.get_submodule(site.outer)).double()
        columns = weight.view(len(weight), site.count, site.columns.size)
        moment = moments.sums[site.name] / max(moments.tokens, 1)
        found[site.name] = torch.einsum("ous,ust,out->u", columns, moment, columns).cpu()
    return found


class _Moments:
    """Sums of ``a_u a_uᵀ`` per unit over tokens that are not padding, in float64."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sums = {
            site.name: torch.zeros(site.count, site.columns.size, site.columns.size, dtype=torch.float64)
            for site in sites
        }
        self.tokens = 0
        self._real = torch.empty(0)

    def begin(self, batch: Batch) -> None:
        self._real = batch["attention_mask"].bool()
        self.tokens += int(self._real.sum())

    def hook(self, site: Site) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            # float32 holds the products of one batch; sums over batches need more.
            parts = wide(inputs[0].detach()[self._real]).view(-1, site.count, site.columns.size)
            self.sums[site.name] = self.sums[site.name].to(parts.device) + torch.einsum("nus,nut->ust", parts, parts)

        return add


def block_influences(model: Any, batches: Sequence[Batch], progress: Progress | None = None) -> Tensor:
    """How much each block turns what passes through it: ``1 − E[cos(input, output)]`` over all tokens but padding.

    Block influence of ShortGPT (Men et al. 2024, arXiv 2403.03853, eq. 1).

    Returns:
        float64 ``[blocks]``.
    """
    layers = blocks_of(model)
    sums, count, real = torch.zeros(len(layers), dtype=torch.float64), 0, torch.empty(0)

    def begin(batch: Batch) -> None:
        nonlocal real, count
        real = batch["attention_mask"].bool()
        count += int(real.sum())

    def hook(index: int) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
            before = args[0] if args else options["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosines = F.cosine_similarity(before[real].float(), after[real].float(), dim=-1)
            sums[index] += cosines.double().sum().cpu()

        return add

    hooks = [block.register_forward_hook(hook(i), with_kwargs=True) for i, block in enumerate(layers)]
    try:
        with torch.no_grad():
            run_batches(model, batches, begin, progress)
    finally:
        for handle in hooks:
            handle.remove()
    return 1 - sums / max(count, 1)


def run_batches(
    model: Any, batches: Sequence[Batch], begin: Callable[[Batch], None], progress: Progress | None = None
) -> None:
    """Run the body of a model on batches, in evaluation mode and without keeping keys and values."""
    device = next(model.parameters()).device
    with evaluating(model):
        for done, batch in enumerate(batches):
            moved = {key: value.to(device) for key, value in batch.items()}
            begin(moved)
            model.base_model(**moved)
            if progress is not None:
                progress(done + 1, len(batches), "looking at activations")


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """In evaluation mode and without a cache of keys and values; each module as before afterwards."""
    with undisturbed(model, {}), eager(model):
        yield
