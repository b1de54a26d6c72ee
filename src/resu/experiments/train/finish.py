"""The end of a run: commit, measure, save."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import resu
from resu.core.counting import keep_count
from resu.core.mask import SparseMask
from resu.core.pattern import Unstructured
from resu.experiments.data import TrainingData
from resu.experiments.train.evaluation import evaluate, metric_of
from resu.experiments.train.folder import CHECKPOINT, MASKS, MODEL, RESULT
from resu.experiments.train.result import Result, environment, recipe_of, settings_of, write_json
from resu.experiments.train.state import State
from resu.experiments.train.typed import plain
from resu.formats.files import save_checkpoint
from resu.pruning.mask_ops import save_mask

__all__ = ["finish"]


def finish(state: State, data: TrainingData, out: Path) -> Result:
    """Make the network the plain one, measure it, and write model, masks and result; the checkpoint goes."""
    config, sparsifier = state.config, state.sparsifier
    report = None if sparsifier is None else _report(state, data)
    masks = {} if sparsifier is None else dict(sparsifier.commit())
    val, test = (round(evaluate(state.model, data, part, state.placement), 5) for part in ("val", "test"))
    total = sum(mask.numel for mask in masks.values())
    result = Result(
        data=data.name,
        model=config.model.name,
        method=config.method.label or config.method.name,
        sparsity=config.method.sparsity,
        seed=config.seed,
        regime=config.regime,
        steps=state.steps,
        metric=metric_of(data),
        val=val,
        test=test,
        actual_sparsity=round(1 - sum(m.n_active for m in masks.values()) / total, 8) if total else 0.0,
        exact=_exact(state, masks),
        explored=1.0 if report is None else round(report.explored, 6),
        training_flops=1.0 if report is None else _rounded(report.training_flops),
        inference_flops=1.0 if report is None else _rounded(report.inference_flops),
        seconds=round(state.seconds, 2),
        settings=settings_of(config, state.setting),
        recipe=recipe_of(config),
        torch=torch.__version__,
        resu=resu.__version__,
    )
    if state.placement.ranks.rank == 0:
        about = {"data": result.data, "method": result.method, "seed": result.seed, "steps": result.steps}
        save_checkpoint(state.model, out / MODEL, metadata=about, overwrite=True)
        if masks:
            save_mask(masks, out / MASKS, metadata=about, overwrite=True)
        layers = [] if report is None else report.as_dict()["layers"]
        where = environment(state.placement.device, state.placement.ranks.world)
        document = {**asdict(result), "config": plain(config), "layers": layers, "environment": where}
        write_json(out / RESULT, document)
        (out / CHECKPOINT).unlink(missing_ok=True)
    state.placement.ranks.barrier()
    return result


def _report(state: State, data: TrainingData) -> Any:
    """The driver's report; with the operations of one example, where it counts them."""
    assert state.sparsifier is not None
    x, _ = state.placement.inputs(*data.take(torch.zeros(1, dtype=torch.int64)))
    return state.sparsifier.report(example_inputs=x)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _exact(state: State, masks: dict[str, SparseMask]) -> bool:
    """Whether pruned weights are exactly +0 and as many as asked for.

    A pattern other than single weights within tensors decides which counts there can be, so there its rule counts.
    """
    if state.sparsifier is None:
        return True
    weights = {name: layer.weight.detach() for name, layer in state.sparsifier.layers.items()}
    pattern, zeros, legal = state.sparsifier.pattern, True, True
    for name, mask in masks.items():
        pruned: Tensor = mask.get_pruned(weights[name])
        zeros = zeros and not bool(pruned.any() | pruned.signbit().any())
        seen = state.sparsifier.layers[name].matrix(mask.mask)
        legal = legal and state.sparsifier.algorithm.violations(seen, pattern) == 0
    total = sum(mask.numel for mask in masks.values())
    kept = sum(mask.n_active for mask in masks.values())
    if pattern == Unstructured() and isinstance(state.sparsifier.distribution, str):
        return zeros and kept == keep_count(total, state.config.method.sparsity)
    return zeros and legal
