"""How much each residual block does: by the loss without it, or by how little it turns what passes through."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from resu.pruning.statistics import run_batch, to_device, undisturbed
from resu.pruning.structured.blocks import remove_blocks

__all__ = ["block_scores"]


@torch.no_grad()
def block_scores(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Any],
    *,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Tensor:
    """How much each block does, higher = keep.

    With ``loss_fn`` the mean loss of the model without that block. Batch norms then take the statistics of the batch:
    those that they keep are of the model with all blocks, and training soon replaces them. Else its influence
    ``1 − E[cos(input, output)]`` over samples, each flattened (ShortGPT, Men et al. 2024, arXiv 2403.03853, eq. 1,
    which takes it per token).

    Args:
        model: Run in evaluation mode; not changed.
        names: Blocks, of :func:`find_blocks`.
        batches: For ``loss_fn`` as it wants them; else tensors, mappings of keyword arguments, or tuples that begin
            with the input. They are run once, and with ``loss_fn`` once per block.
        loss_fn: ``loss_fn(model, batch) -> loss``.

    Returns:
        float64 ``[len(names)]``.

    Raises:
        ValueError: Without batches, or if a loss is not one finite number.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("blocks are scored on data; give at least one batch as calibration")
    with undisturbed(model, {}):
        return _losses(model, names, batches, loss_fn) if loss_fn else _influences(model, names, batches)


def _losses(
    model: nn.Module, names: Sequence[str], batches: Sequence[Any], loss_fn: Callable[[nn.Module, Any], Tensor]
) -> Tensor:
    scores = torch.zeros(len(names), dtype=torch.float64, device="cpu")
    with _batch_statistics(model):
        for index, name in enumerate(names):
            removal = remove_blocks(model, [name])
            try:
                losses = [loss_fn(model, batch) for batch in batches]
            finally:
                removal.undo()
            for loss in losses:
                one = isinstance(loss, float) or (isinstance(loss, Tensor) and loss.numel() == 1)
                if not one or not math.isfinite(float(loss)):
                    raise ValueError(f"loss_fn must return one finite number; without block {name!r} it gave {loss!r}")
            scores[index] = sum(map(float, losses)) / len(losses)
    return scores


@contextmanager
def _batch_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, batch norms use the statistics of each batch, and leave those that they keep alone."""
    norms = [(m, m.training, m.track_running_stats) for m in model.modules() if isinstance(m, _BatchNorm)]
    try:
        for norm, _, _ in norms:
            norm.training, norm.track_running_stats = True, False
        yield
    finally:
        for norm, training, tracking in norms:
            norm.training, norm.track_running_stats = training, tracking


def _influences(model: nn.Module, names: Sequence[str], batches: Sequence[Any]) -> Tensor:
    sums, counts = torch.zeros(2, len(names), dtype=torch.float64, device="cpu")
    before: dict[int, Tensor] = {}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    hooks = []

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            before[index] = args[0].clone()  # blocks may work in place

        return hook

    def add(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            cosines = F.cosine_similarity(before.pop(index).flatten(1).double(), output.flatten(1).double())
            sums[index] += cosines.sum().cpu()
            counts[index] += len(cosines)

        return hook

    for index, name in enumerate(names):
        block = model.get_submodule(name)
        hooks += [block.register_forward_pre_hook(keep(index)), block.register_forward_hook(add(index))]
    try:
        for batch in batches:
            run_batch(model, to_device(batch, device))
    finally:
        for handle in hooks:
            handle.remove()
    influences: Tensor = 1 - sums / counts.clamp_min(1)
    return influences
