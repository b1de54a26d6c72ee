"""Sensitivity: how much the loss grows when one layer alone is pruned, and a budget made from it."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import resu
from resu.core.counting import check_finite, check_sparsity
from resu.core.io import FileFormatError, open_header, replacing, seal_header
from resu.core.layers import Layer
from resu.core.mask import SparseMask
from resu.core.pattern import Pattern, Unstructured, get_pattern
from resu.pruning.budget import check_stacks, stack_rows
from resu.pruning.importance import compute_layer_importance, importances
from resu.pruning.sensitivity_allocation import Point, Sensitivity, allocate_by_sensitivity
from resu.pruning.snapshots import model_checksum
from resu.pruning.targets import pruning_targets

__all__ = ["Point", "Sensitivity", "allocate_by_sensitivity", "sensitivity_scan"]

_KEY, _VERSION = "resu_sensitivity", 1


def sensitivity_scan(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float | Tensor],
    sparsities: Sequence[float] = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95),
    *,
    method: str = "magnitude",
    pattern: Pattern | str | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    calibration: Iterable[Any] | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Sensitivity:
    """The loss with one layer pruned at a time, for each layer and sparsity; the model is left as it was.

    Weights are put back bit for bit after each layer, also after an error, and the model's training flags after the
    scan, which runs in evaluation mode. Costs ``layers · len(sparsities) + 1`` evaluations and a copy of one weight.

    Args:
        model: Any module.
        evaluate: ``evaluate(model) -> loss``, lower is better, called without gradients: on a few fixed batches.
        sparsities: To try in each layer.
        method: Name of a registered score.
        pattern: As in :func:`resu.core.pattern.get_pattern`; None: single weights, compared where the score says.
        include: Globs of what to scan, as in :func:`resu.pruning.targets.pruning_targets`.
        exclude: Globs of what to leave out.
        calibration: Batches, for scores that look at inputs or gradients.
        loss_fn: ``loss_fn(model, batch) -> loss``, for scores that look at gradients.
        seed: Of random scores.
        cache: JSON file that is read if it is of these settings, these weights and the same loss of the unpruned model,
            written after each layer (an interrupted scan goes on), and begun anew with a warning if it is not.
        progress: Called ``(done, total, what)`` after each layer.

    Returns:
        Losses by layer and sparsity; ``.plot(path)`` draws them, ``.allocation`` makes budgets of them.

    Raises:
        ValueError: If the loss of the unpruned model is not finite, a sparsity is out of range, or a glob matches
            nothing. A loss that overflows under pruning counts as infinite.
        FileFormatError: If ``cache`` is another file than a scan, or damaged.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> x = torch.randn(32, 8)
        >>> with torch.no_grad():
        ...     y = model(x)
        >>> scan = sensitivity_scan(model, lambda m: (m(x) - y).square().mean(), (0.25, 0.5, 0.75))
        >>> sum(allocate_by_sensitivity(scan, 0.5).values()), 8 * 16 + 16 * 4
        (96, 192)
    """
    levels = sorted({float(check_sparsity(s)) for s in sparsities} - {0.0})
    if not levels:
        raise ValueError("there is no sparsity above 0 to scan")
    layers, _ = pruning_targets(model, include, exclude)
    importance = importances[method]
    shape = Unstructured(importance.scope) if pattern is None else get_pattern(pattern)
    check_stacks(shape, stack_rows(layers))
    settings: dict[str, Any] = {
        "method": method,
        "pattern": repr(shape),
        "sparsities": levels,
        "seed": seed,
        "layers": {name: list(layer.weight.shape) for name, layer in layers.items()},
    }
    if cache is not None and not Path(cache).absolute().parent.is_dir():  # before hours of work
        raise FileNotFoundError(f"the folder {Path(cache).absolute().parent} does not exist; make it first")
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        baseline = _loss(evaluate, model)
        if not math.isfinite(baseline):
            raise ValueError(f"evaluate(model) gave {baseline} for the unpruned model; it must return a finite loss")
        points: dict[str, tuple[Point, ...]] = {}
        sums = model_checksum(model) if cache is not None else ""
        if cache is not None:
            points = _cached(cache, settings, sums, baseline)
        left = [name for name in layers if name not in points]
        scores: Mapping[str, Tensor] = {}
        if left:
            scores = compute_layer_importance(model, method, calibration, loss_fn=loss_fn, include=left, seed=seed)
        for name in left:
            score = layers[name].matrix(scores[name])
            check_finite(score, f"scores of {name!r}")
            points[name] = _scan_layer(model, layers[name], score, shape, levels, evaluate)
            if cache is not None:
                _write(cache, settings, sums, baseline, points)
            if progress is not None:
                progress(len(points), len(layers), name)
    finally:
        for module, flag in flags.items():
            module.training = flag
    return Sensitivity(baseline, {name: points[name] for name in layers}, settings)


def _loss(evaluate: Callable[[nn.Module], float | Tensor], model: nn.Module) -> float:
    with torch.no_grad():
        loss: Any = evaluate(model)
    try:
        return float(loss)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"evaluate(model) must return one number, got {type(loss).__name__}") from None


def _scan_layer(
    model: nn.Module,
    layer: Layer,
    score: Tensor,
    pattern: Pattern,
    levels: Sequence[float],
    evaluate: Callable[[nn.Module], float | Tensor],
) -> tuple[Point, ...]:
    weight = layer.weight
    before = weight.detach().clone()
    points = []
    try:
        for sparsity in levels:
            chosen = pattern.select(score, pattern.keep_for(score.shape, sparsity))
            mask = SparseMask(layer.unmatrix(chosen)).to(weight.device)
            mask.apply_(weight)
            loss = _loss(evaluate, model)
            points.append(Point(sparsity, mask.n_active, mask.numel, loss if math.isfinite(loss) else math.inf))
            with torch.no_grad():
                weight.copy_(before)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    return tuple(points)


def _write(
    path: str | os.PathLike[str],
    settings: Mapping[str, Any],
    weights: str,
    baseline: float,
    points: Mapping[str, Sequence[Point]],
) -> None:
    body = {
        "version": _VERSION,
        "library": resu.__version__,
        "settings": settings,
        "weights": weights,
        "baseline": baseline,
        "layers": {
            name: [
                # JSON has no infinity.
                [p.sparsity, p.keep, p.numel, p.loss if math.isfinite(p.loss) else None]
                for p in row
            ]
            for name, row in points.items()
        },
    }
    with replacing(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(seal_header(_KEY, body)), encoding="utf-8")


def _cached(
    path: str | os.PathLike[str], settings: Mapping[str, Any], weights: str, baseline: float
) -> dict[str, tuple[Point, ...]]:
    """What the file knows of this very scan; nothing, with a warning, if it is of another."""
    try:
        with open(path, encoding="utf-8") as file:
            given = json.load(file)
    except FileNotFoundError:
        return {}
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FileFormatError(f"{path} is no cached scan, or damaged ({error}); delete it or name another") from None
    if not isinstance(given, dict):
        raise FileFormatError(f"{path} is no cached scan; name another file")
    body = open_header(_KEY, given, _VERSION, path)
    stale = [name for name in settings if body["settings"].get(name) != settings[name]]
    if body["weights"] != weights:
        stale.append("weights")
    # One evaluation tells whether the data or the loss is another; threads may change the last digits.
    elif not math.isclose(body["baseline"], baseline, rel_tol=1e-5, abs_tol=1e-12):
        stale.append(f"loss of the unpruned model, {body['baseline']:.6g} there and {baseline:.6g} now")
    if stale:
        warnings.warn(
            f"the scan in {path} is of other {', '.join(stale)}; it is computed again and replaced", stacklevel=3
        )
        return {}
    return {
        name: tuple(Point(s, keep, n, math.inf if loss is None else loss) for s, keep, n, loss in row)
        for name, row in body["layers"].items()
    }
