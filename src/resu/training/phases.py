"""What the phases of a resurrection cycle do to the layers: prune, enter, leave, commit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from resu.core.mask import SparseMask
from resu.core.optimizer_state import clear_state
from resu.core.pattern import Unstructured
from resu.core.randomness import derived_generator, derived_seed
from resu.modules.base import RESUMode, RESUModule
from resu.pruning.allocation import allocate
from resu.pruning.amnesty import Amnesty
from resu.pruning.importance import Stats, importances
from resu.training.config import RESUConfig

__all__ = ["Layers", "commit_layers", "enter_layers", "prune_layers", "sparsity_of"]

Layers = Mapping[str, RESUModule]


def sparsity_of(layers: Layers) -> float:
    """Fraction of all weights of the layers that is pruned."""
    total = sum(layer.weight_shape.numel() for layer in layers.values())
    return sum(layer.mask.n_pruned for layer in layers.values() if layer.mask is not None) / total


@contextmanager
def seeded(seed: int, *key: object) -> Iterator[None]:
    """Draw from a generator derived from ``seed`` and ``key``; the global one goes on as if nothing had happened."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed every accelerator too and leave it so.
        torch.default_generator.manual_seed(derived_seed(seed, *key))
        yield


def stats_of(layer: RESUModule, name: str, config: RESUConfig, cycle: int) -> Stats:
    """What a score may look at: the last gradient, the captured input norms, a generator of its own."""
    generator = derived_generator(config.seed, name, cycle, "score")
    norms = layer.activation_norms
    if norms is not None:  # of the weight's shape, so that groups of a convolution see their own inputs
        norms = layer._norms_like_weight(norms).expand(layer.weight_shape)
    return Stats(grad=layer.weight.grad, input_norm=norms, generator=generator)


def scores_of(layers: Layers, method: str, config: RESUConfig, cycle: int) -> dict[str, Tensor]:
    """Scores of dense layers by a registered importance."""
    importance = importances[method]
    return {
        name: importance(layer.effective_weight().detach(), stats_of(layer, name, config, cycle))
        for name, layer in layers.items()
    }


def _shapes(layers: Layers) -> dict[str, torch.Size]:
    return {name: layer.weight_shape for name, layer in layers.items()}


def prune_layers(
    layers: Layers,
    sparsity: float,
    config: RESUConfig,
    optimizer: Optimizer | None,
    cycle: int,
    method: str | None = None,
) -> None:
    """Prune to ``sparsity`` over all layers, exact to one weight; pruned positions stay pruned.

    Under ``distribution="global"`` all weights compete; otherwise each layer gets its share. Scores with row scope
    (Wanda) compete within rows, of which each keeps the same count to one weight. Optimizer state of newly pruned
    positions is cleared.
    """
    scores = scores_of(layers, method or config.pruning_method, config, cycle)
    for name, layer in layers.items():
        if layer.mask is not None:  # what is pruned ranks below every active weight, zeros among them
            floor = scores[name].min() - 1
            scores[name] = torch.where(layer.mask.mask, scores[name], floor)
    # Scores that compare within a row say nothing about other rows or layers.
    by_row = importances[method or config.pruning_method].scope == "row"
    distribution = "uniform" if by_row and config.distribution == "global" else config.distribution
    keeps = allocate(distribution, _shapes(layers), sparsity, scores)
    pattern = Unstructured("row" if by_row else "tensor")
    for name, layer in layers.items():
        set_mask(layer, pattern.select(scores[name], keeps[name]), optimizer)


def set_mask(layer: RESUModule, new: Tensor, optimizer: Optimizer | None) -> None:
    """Make ``new`` the mask, or none where it keeps everything, and clear optimizer state of changed positions."""
    old = layer.mask.mask if layer.mask is not None else torch.ones_like(new)
    if bool(new.all()):
        if layer.mask is not None:
            layer.remove_mask()
    else:
        layer.set_mask(SparseMask(new))
    if optimizer is not None:
        clear_state(optimizer, layer.weight, old ^ new)


def enter_layers(layers: Layers, config: RESUConfig, cycle: int) -> None:
    """Start θ in every layer that has pruned positions."""
    for name, layer in layers.items():
        if layer.mask is None or layer.mask.n_pruned == 0:
            continue
        with seeded(config.seed, name, cycle, "theta"):
            if config.quantize_bits is None:
                layer.enter_resu_mode(
                    config.resu_epsilon,
                    use_selective=config.use_selective,
                    selective_config=config.selection(),
                    lr=config.resu_lr,
                )
            elif config.use_selective:
                layer.enter_qresu_selective_mode(
                    config.quantize_bits,
                    config.resu_epsilon,
                    config.qscheme,
                    selective_config=config.selection(),
                    lr=config.resu_lr,
                )
            else:
                layer.enter_qresu_mode(config.quantize_bits, config.resu_epsilon, config.qscheme)


def leave(layer: RESUModule) -> SparseMask | None:
    """Merge θ into a dense weight; returns the mask from before, None if there was none."""
    mask = layer.mask
    if layer.mode is RESUMode.RESU:
        layer.exit_resu_mode(commit=True)
    elif layer.mode in (RESUMode.QRESU, RESUMode.QRESU_SELECTIVE):
        layer.exit_qresu_mode(commit=True)
    return mask


def commit_layers(
    layers: Layers,
    old: Mapping[str, SparseMask | None],
    target: float,
    config: RESUConfig,
    optimizer: Optimizer | None,
    cycle: int,
) -> dict[str, float]:
    """Decide which merged θ stay; the layers have been merged by :func:`leave` and are dense.

    Returns:
        ``n_resurrected, n_active_kept, resurrection_budget, resurrection_rate``.
    """
    n_pruned = sum(mask.n_pruned for mask in old.values() if mask is not None)
    n_active = sum(mask.n_active for mask in old.values() if mask is not None)
    budget = 0.0
    if config.commit_strategy == "simple":
        resurrected, kept = n_pruned, n_active
    elif config.commit_strategy == "wanda_reprune":
        prune_layers(layers, target, config, optimizer, cycle, method="wanda")
        resurrected, kept = _survivors(layers, old)
    else:
        amnesty = Amnesty(config.amnesty())
        budget = amnesty.resurrection_budget(cycle)
        scores = scores_of(layers, amnesty.config.importance, config, cycle)
        keeps = _keeps_at_commit(layers, old, scores, target, config)
        for name, layer in layers.items():
            mask = old[name]
            if mask is None:
                continue
            new = amnesty.tournament(scores[name], mask.mask, keeps[name], cycle)
            set_mask(layer, new, None)
            if optimizer is not None:
                clear_state(optimizer, layer.weight, mask.mask ^ new)
        resurrected, kept = _survivors(layers, old)
    return {
        "n_resurrected": resurrected,
        "n_active_kept": kept,
        "resurrection_budget": budget,
        "resurrection_rate": resurrected / n_pruned if n_pruned else 0.0,
    }


def _keeps_at_commit(
    layers: Layers,
    old: Mapping[str, SparseMask | None],
    scores: Mapping[str, Tensor],
    target: float,
    config: RESUConfig,
) -> dict[str, int]:
    """PRUNE has set each layer's count already, unless the target lies below it (densification)."""
    shapes = _shapes(layers)
    counts = {n: shapes[n].numel() if (mask := old[n]) is None else mask.n_active for n in layers}
    if sum(counts.values()) >= sum(allocate("uniform", shapes, target).values()):
        return counts
    return allocate(config.distribution, shapes, target, scores)


def _survivors(layers: Layers, old: Mapping[str, SparseMask | None]) -> tuple[int, int]:
    """How many formerly pruned and how many formerly active positions are active now."""
    resurrected = kept = 0
    for name, layer in layers.items():
        before = old[name]
        if before is None:
            continue
        now = layer.mask.mask if layer.mask is not None else torch.ones_like(before.mask)
        was = before.mask
        resurrected += int((now & ~was).sum())
        kept += int((now & was).sum())
    return resurrected, kept
