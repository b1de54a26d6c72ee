"""Scores from gradients: how much the output would change, to first order, if a unit were silent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from resu.core.randomness import derived_generator
from resu.integrations.shrink.activity import evaluating
from resu.integrations.shrink.exactness import classifies
from resu.integrations.shrink.families import Site
from resu.integrations.shrink.quality import causal_losses, pooled

__all__ = ["taylor_scores"]

Batch = Mapping[str, Tensor]
Progress = Callable[[int, int, str], None]


def taylor_scores(
    model: Any, sites: Sequence[Site], batches: Sequence[Batch], seed: int = 0, progress: Progress | None = None
) -> dict[str, Tensor]:
    """``E_x |Σ a·∂L/∂a|`` of each unit: the sum over its activations and tokens, its size, and the mean over samples.

    For heads it is the importance of Michel et al. 2019 (arXiv 1905.10650, eq. 2), for neurons the same. ``L`` of a
    decoder is the mean negative log-likelihood of a sample's tokens. An encoder has no loss on plain text: its ``L`` is
    the sentence embedding (mean-pooled, of length one; of a classifier: its logits) times random numbers
    ``z ~ N(0, I)``, drawn for each sample; ``E_z |z·v| ∝ ‖v‖``, so the score is the length of the change to first
    order, whatever its direction.

    Args:
        model: A ``PreTrainedModel``; its weights get no gradients, and all is as before afterwards.
        sites: Where the units are.
        batches: ``input_ids`` and ``attention_mask``, int64 ``[batch, tokens]``.
        seed: Of the random numbers.
        progress: Called with (done, total, what).

    Returns:
        ``{site name: float64 [units]}``.
    """
    base = model.base_model
    sums = {site.name: torch.zeros(site.count, dtype=torch.float64) for site in sites}
    hooks = [base.get_submodule(site.outer).register_forward_pre_hook(_watch(site, sums)) for site in sites]
    generator = derived_generator(seed, "taylor")
    device, samples = next(model.parameters()).device, 0
    try:
        with evaluating(model), _frozen(model), torch.enable_grad():
            for done, batch in enumerate(batches):
                moved = {key: value.to(device) for key, value in batch.items()}
                _target(model, moved, generator).backward()
                samples += len(moved["input_ids"])
                if progress is not None:
                    progress(done + 1, len(batches), "looking at gradients")
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / max(samples, 1) for name, total in sums.items()}


def _watch(site: Site, sums: dict[str, Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        values = inputs[0]
        held = values.detach()

        def add(gradient: Tensor) -> None:
            change = (held * gradient).float().sum(dim=1).view(len(held), site.count, -1).sum(dim=-1)
            sums[site.name] += change.abs().double().sum(dim=0).cpu()

        if values.requires_grad:
            values.register_hook(add)

    return hook


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Weights without gradients; what the first embedding gives has one in their place."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handle = model.get_input_embeddings().register_forward_hook(lambda m, i, output: output.requires_grad_())
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)


def _target(model: Any, batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """``L``, summed over the samples of a batch."""
    if model.can_generate():
        losses, counted = causal_losses(model, batch)
        return ((losses * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)).sum()
    if classifies(model):
        value = model(**batch).logits.float()
    else:
        value = pooled(model.base_model(**batch).last_hidden_state, batch["attention_mask"])
    directions = torch.randn(value.shape, generator=generator).to(value.device)
    return torch.sum(value * directions)
