"""One-shot pruning of a model: scores, budgets, masks, and weights that make up for what is gone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resu.core.counting import check_finite
from resu.core.layers import Layer
from resu.core.pattern import Pattern, Unstructured, get_pattern
from resu.pruning.allocation import Allocation, described
from resu.pruning.budget import plan_budget, stack_rows
from resu.pruning.decisions import Recipe
from resu.pruning.importance import importances
from resu.pruning.layerwise import Walk
from resu.pruning.one_shot_files import OneShotFolder, batches_checksum
from resu.pruning.one_shot_run import Job
from resu.pruning.statistics import collect
from resu.pruning.targets import pruning_targets

__all__ = ["PruneResult", "calibration_list", "prune_model"]


@dataclass(frozen=True)
class PruneResult:
    """What :func:`prune_model` did.

    Attributes:
        masks: ``{parameter name: bool mask}``, True = kept, each of the parameter's shape and on its device. A kept
            weight may be 0.
        report: Plain JSON: ``method``, ``pattern``, ``distribution``, ``sparsity`` (as asked), ``refine``, ``update``;
            ``actual`` (sparsity over the pruned layers), ``total`` (over all parameters of the model); ``layers``, a
            list of ``{name, shape, kept, numel, sparsity}`` with ``damping`` and ``error`` (``‖(W-Ŵ)X‖ / ‖WX‖``) where
            they are known; ``skipped``, ``{parameter: reason}``; ``warnings``; ``seconds``.
    """

    masks: dict[str, Tensor]
    report: dict[str, Any]


def prune_model(
    model: nn.Module,
    sparsity: float | Mapping[str, float] | None,
    method: str = "magnitude",
    *,
    pattern: Pattern | str | None = None,
    distribution: str | Allocation | None = None,
    calibration: Iterable[Any] | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    refine: str | None = None,
    update: str | None = None,
    blocks: str | Iterable[str] | None = None,
    device: torch.device | str | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    seed: int = 0,
) -> PruneResult:
    """Prune ``model`` in place, in one shot.

    What a method looks at decides the way. Scores of weights alone (magnitude, …) are ranked at once. Scores of
    gradients take them from the dense model. Scores of inputs (Wanda, RIA) and everything with a Hessian (SparseGPT) go
    layer by layer (:mod:`resu.pruning.layerwise`): a block is pruned by statistics of what the pruned blocks before it
    give it, and one block at a time lies on ``device``. A distribution that looks at scores takes a pass over the dense
    model before that, with all scores in main memory.

    Parameters keep their identity, memory, dtype and ties. If something raises, every block is either pruned whole or
    as it was.

    Args:
        model: Any module.
        sparsity: Fraction removed; or ``{glob: sparsity}`` over parameter or module names, where the first glob that
            matches a layer counts and layers matched by none stay dense; None: that of an N:M pattern.
        method: Name of a registered importance. ``"sparsegpt"`` is the solver: mask and weight update in one.
        pattern: A pattern or its name (``"2:4"``, ``"row"``, ``"block:16x1"``); None: single weights, which compete
            where the score says (Wanda within rows, the others within the layer). The height of blocks must divide the
            rows of each expert of a fused stack.
        distribution: How one sparsity is divided over layers (``"erk"``, ``"global"``, ``"owl"``, …); None: every layer
            gets ``sparsity``.
        calibration: Batches: tensors, tuples whose first entry is the input, or mappings of keyword arguments (with
            ``attention_mask`` where there is padding). They are kept in main memory.
        loss_fn: ``loss_fn(model, batch) -> loss``, for scores that look at gradients.
        include: Globs of what to prune, as in :func:`resu.pruning.targets.pruning_targets`; None: every weight that
            multiplies but embeddings, what is tied to them, and the output head.
        exclude: Globs of what to leave out.
        refine: ``"dsnot"``: swap kept and pruned weights against the drift of the output (unstructured and N:M).
        update: ``"sparsegpt"``: let the weights that stay make up for those that go, whatever chose the mask.
        blocks: Globs of the modules that run one after another; None: found.
        device: Where to compute; None: where the model is.
        forward: ``forward(model, batch)`` where the default is not right.
        checkpoint: A folder; after each block everything is stored there, and the same call goes on from there after an
            interrupt, with the same result bit for bit. For methods that go layer by layer; the others take no
            time worth it, and leave nothing there.
        progress: Called ``(done, total, what)`` after each layer.
        seed: Of random scores.

    Returns:
        :class:`PruneResult`.

    Raises:
        ValueError: On an unknown name (the known ones are listed), a sparsity outside [0, 1) or one that the pattern
            does not have, a combination that makes no sense, a glob that matches nothing, missing calibration, NaN or
            infinity in what is pruned, with calibration in any parameter, or in a layer's inputs (each by name), blocks
            across experts, or a checkpoint of another run (what differs is named).

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> result = prune_model(model, 0.5, "wanda", calibration=[torch.randn(8, 16)])
        >>> {name: int(mask.sum()) for name, mask in result.masks.items()}
        {'0.weight': 256, '2.weight': 64}
        >>> result.report["actual"], int((model[0].weight == 0).sum())
        (0.5, 256)
    """
    started = time.monotonic()
    importance = importances[method]
    chosen = Unstructured(importance.scope) if pattern is None else get_pattern(pattern)
    recipe = Recipe(method, chosen, refine, update, seed)
    layers, skipped = pruning_targets(model, include, exclude)
    _check_weights(layers)
    budget = plan_budget(layers, sparsity, chosen, distribution, stack_rows(layers))
    skipped |= {name: "matched by no glob of sparsity" for name in layers if name not in budget.sparsities}
    layers = {name: layers[name] for name in budget.sparsities}
    batches = _check_data(recipe, calibration_list(calibration), loss_fn)
    _check_values(model, layers, everything=bool(recipe.needs))
    asked = {
        "method": method,
        "pattern": str(chosen),
        "distribution": described(distribution),
        "sparsity": dict(sparsity) if isinstance(sparsity, Mapping) else budget.sparsity,
        "refine": refine,
        "update": update,
    }
    job = Job(model, layers, recipe, budget, progress=progress)
    if "grads" in recipe.needs:
        job.grads = collect(model, layers, batches, {"grads"}, loss_fn=loss_fn)
    if recipe.needs & {"inputs", "hessian"}:
        settings = {
            **asked,
            "seed": seed,
            "blocks": blocks if blocks is None or isinstance(blocks, str) else list(blocks),
            "layers": list(layers),
        }
        folder = None
        with Walk(model, layers, batches, blocks=blocks, forward=forward, device=device) as walk:
            if checkpoint is not None:
                folder = OneShotFolder(checkpoint, settings | {"calibration": batches_checksum(walk.batches)})
            job.walk(walk, folder)
    else:
        job.at_once()
    report = {
        **asked,
        **_totals(model, job.masks),
        "layers": [job.entries[name] for name in layers],
        "skipped": skipped,
        "warnings": job.warnings,
        "seconds": time.monotonic() - started,
    }
    return PruneResult({name: job.masks[name] for name in layers}, report)


def _check_weights(layers: Mapping[str, Layer]) -> None:
    for name, layer in layers.items():
        weight = layer.weight
        if weight.device.type == "meta":
            raise ValueError(f"{name!r} is on the meta device (not loaded, or offloaded); load the model whole")
        if not weight.is_floating_point():
            raise ValueError(f"{name!r} has dtype {weight.dtype}; dequantize it first, or exclude it")
        if not weight.numel():
            raise ValueError(f"{name!r} is empty (shape {tuple(weight.shape)}); exclude it")


def _check_values(model: nn.Module, layers: Mapping[str, Layer], *, everything: bool) -> None:
    """NaN, infinity: named where they are, before the layers behind them see them in their inputs.

    Args:
        model: The model.
        layers: What is pruned.
        everything: Whether the model is run, so that its other parameters matter too.
    """
    for name, layer in layers.items():
        check_finite(layer.weight, repr(name))
    pruned = {id(layer.weight) for layer in layers.values()}
    for name, parameter in model.named_parameters() if everything else ():
        if id(parameter) not in pruned and not parameter.is_meta:
            check_finite(parameter, repr(name))


def calibration_list(calibration: Iterable[Any] | None) -> list[Any] | None:
    """Batches as a list; what is one batch is a list of one, and None stays None.

    Raises:
        TypeError: If it is a path, or nothing that can be gone through.
    """
    if calibration is None:
        return None
    if isinstance(calibration, (str, bytes, os.PathLike)):
        raise TypeError(
            f"calibration must be an iterable of batches, got {calibration!r}; read and tokenize the file first"
        )
    if isinstance(calibration, (Tensor, Mapping)):
        return [calibration]  # one batch
    if not isinstance(calibration, Iterable):
        raise TypeError(f"calibration must be an iterable of batches, got {type(calibration).__name__}")
    return list(calibration)


def _check_data(recipe: Recipe, batches: list[Any] | None, loss_fn: object) -> list[Any]:
    own = importances[recipe.method].needs
    if recipe.needs and not batches:
        who = f"method {recipe.method!r}" if own else ("refine='dsnot'" if recipe.refine else "update='sparsegpt'")
        what = "there is none" if batches is None else "it holds no batch"
        raise ValueError(f"{who} needs calibration data and {what}; pass calibration=batches")
    if "grads" in own and loss_fn is None:
        raise ValueError(f"method {recipe.method!r} needs gradients; pass loss_fn(model, batch) -> loss")
    return batches or []


def _totals(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, float]:
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    return {
        "actual": pruned / sum(mask.numel() for mask in masks.values()),
        "total": pruned / sum(p.numel() for p in model.parameters()),
    }
