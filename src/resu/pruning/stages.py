"""Iterative pruning: prune a stage, fine-tune under its masks, go back where it costs too much."""

from __future__ import annotations

import inspect
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resu.core.mask import SparseMask
from resu.pruning.compression import CompressionStats
from resu.pruning.holding import HeldMasks
from resu.pruning.magnitude_pruner import MagnitudePruner
from resu.pruning.pruner import Pruner, check_pruner, record
from resu.pruning.snapshots import take_snapshot
from resu.pruning.stage_files import RunFolder
from resu.pruning.stage_plan import StagePlan, plan_stages, reached_by
from resu.pruning.stage_results import IterativeResult, StageResult

__all__ = ["IterativeResult", "StagePlan", "StageResult", "of_model_and_stage", "plan_stages", "prune_iteratively"]


def prune_iteratively(
    model: nn.Module,
    stages: StagePlan | Sequence[float] | int,
    finetune_fn: Callable[..., object] | None,
    *,
    target: float | None = None,
    pruner: Pruner | None = None,
    eval_fn: Callable[[nn.Module], float] | None = None,
    higher_is_better: bool = True,
    max_drop: float | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    resume: bool = True,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> IterativeResult:
    """Prune in cumulative stages, each followed by fine-tuning under its masks; in place.

    While ``finetune_fn`` runs, and after the last stage until ``result.release()``, pruned weights are held at exactly
    zero under any ``torch.optim.Optimizer``, made inside or outside. If anything raises, the model goes back to the
    last stage that was done, and lets go of its masks.

    A stage interrupted by a crash is done again by the same call with the same ``checkpoint_dir``: the result equals
    the uninterrupted one bit for bit, if ``finetune_fn`` depends on nothing but the model, the stage number and the
    global random generators (Python, numpy, torch), whose states are part of the checkpoint. Make the optimizer
    inside it.

    Args:
        model: Any module whose state_dict holds tensors.
        stages: A plan of :func:`plan_stages`; or fractions of what is still active; or how many stages, with
            ``target``.
        finetune_fn: ``finetune_fn(model)``, or ``finetune_fn(model, stage)`` if it needs a second argument (1, 2, …);
            None: no fine-tuning.
        target: Final sparsity. With a list of fractions it is checked.
        pruner: What to prune by; None: ``MagnitudePruner``, each layer alike.
        eval_fn: ``eval_fn(model) -> number``, called without gradients before the first stage and after each.
        higher_is_better: Whether that number is an accuracy (True) or a loss (False).
        max_drop: How much worse than before the first stage is too much: the stage is taken back, and the run ends.
        checkpoint_dir: Folder for a checkpoint per stage; None: only the last good stage is kept, in memory.
        resume: Go on with the run in that folder, if there is one.
        overwrite: With ``resume=False``: replace the run that is there.
        progress: Called ``(done, total, what)`` around each stage.

    Returns:
        Masks, a record per stage with per-layer statistics, and bytes by layout.

    Raises:
        ValueError: If the fractions miss the target, the folder holds a run with other settings, or ``max_drop`` comes
            without ``eval_fn``.
        FileExistsError: If the folder holds a run, with ``resume=False`` and ``overwrite=False``.
        FileFormatError: If a checkpoint is damaged; it is named.

    Example:
        >>> import torch
        >>> model = nn.Linear(20, 10)
        >>> def finetune(model):
        ...     optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(8, 20)).square().mean().backward()
        ...         optimizer.step()
        >>> result = prune_iteratively(model, 3, finetune, target=0.7)
        >>> [stage.kept for stage in result.stages], int((model.weight == 0).sum())
        ([134, 90, 60], 140)
    """
    plan = _planned(stages, target)
    check_pruner(pruner)
    if max_drop is not None and eval_fn is None:
        raise ValueError("max_drop compares what eval_fn says; pass eval_fn")
    if max_drop is not None and not max_drop >= 0:
        raise ValueError(f"max_drop is how much worse is too much, a number >= 0; got {max_drop!r}")
    if not resume and checkpoint_dir is None:
        raise ValueError("resume=False is about a checkpoint_dir, and there is none")
    run = _Run(
        model,
        plan,
        MagnitudePruner(plan.target) if pruner is None else pruner,
        of_model_and_stage(finetune_fn),
        eval_fn,
        higher_is_better,
        max_drop,
        progress or (lambda done, total, what: None),
    )
    if checkpoint_dir is not None:
        run.folder = RunFolder(checkpoint_dir, run.settings())
    if run.folder is not None and run.folder.exists() and not resume and not overwrite:
        raise FileExistsError(f"{run.folder.path} holds a run already; pass resume=True to go on, or overwrite=True")
    run.start(resume, overwrite)
    while not run.ended:
        run.stage()
    return run.result()


def _planned(stages: StagePlan | Sequence[float] | int, target: float | None) -> StagePlan:
    if isinstance(stages, StagePlan):
        if target is not None and target != stages.target:
            raise ValueError(f"the plan reaches {stages.target!r}, target says {target!r}; leave target out")
        return stages
    if target is not None:
        return plan_stages(target, stages)
    if isinstance(stages, int):
        raise ValueError(f"{stages} stages to which sparsity? Pass target, or the fractions")
    return plan_stages(round(float(reached_by(stages)[-1]), 12), stages)


def of_model_and_stage(finetune: Callable[..., object] | None) -> Callable[[nn.Module, int], object]:
    """``finetune`` as a function of model and stage, whether it wants the stage or not; None does nothing.

    Raises:
        TypeError: If it is no function, or needs more than two arguments.

    Example:
        >>> of_model_and_stage(lambda model: print("a model"))(nn.Linear(1, 1), 3)
        a model
    """
    if finetune is None:
        return lambda model, stage: None
    if not callable(finetune):
        raise TypeError(f"finetune_fn must be a function of the model, or None; got {type(finetune).__name__}")
    try:
        parameters = inspect.signature(finetune).parameters.values()
    except (TypeError, ValueError):  # some built-in callables have none
        return lambda model, stage: finetune(model)
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(needed) > 2:
        raise TypeError(f"finetune_fn is called with the model and the stage; it needs {len(needed)} arguments")
    return finetune if len(needed) == 2 else lambda model, stage: finetune(model)


@dataclass
class _Run:
    """One iterative run, between two stages."""

    model: nn.Module
    plan: StagePlan
    pruner: Pruner
    finetune: Callable[[nn.Module, int], object]
    evaluate: Callable[[nn.Module], float] | None
    higher_is_better: bool
    max_drop: float | None
    progress: Callable[[int, int, str], None]
    folder: RunFolder | None = None
    masks: dict[str, SparseMask] = field(default_factory=dict)
    records: list[StageResult] = field(default_factory=list)
    baseline: float | None = None
    ended: bool = False
    held: HeldMasks | None = None
    _flags: dict[nn.Module, bool] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        return {
            "sparsities": list(self.plan.sparsities),
            "pruner": re.sub(r" at 0x[0-9a-f]+", "", repr(self.pruner)),  # no address: it differs per process
            "max_drop": self.max_drop,
            "higher_is_better": self.higher_is_better,
            "parameters": {name: list(p.shape) for name, p in self.model.named_parameters()},
        }

    def start(self, resume: bool, overwrite: bool) -> None:
        self._flags = {module: module.training for module in self.model.modules()}
        if self.folder is not None and resume and self.folder.exists():
            body = self.folder.open(self.model)
            self.records = [StageResult(**entry) for entry in body["records"]]
            self.baseline, self.ended = body["baseline"], body["ended"]
            self.masks = self.folder.restore(self.model, randomness=True)
            self.progress(len(self.records), len(self.plan), f"resumed after stage {len(self.records)}")
        else:
            self.baseline = self._evaluated()
            if self.folder is not None:
                self.folder.begin(self.model, self.baseline, overwrite=overwrite)
        self.held = HeldMasks(self.model, self.masks)

    def _evaluated(self) -> float | None:
        if self.evaluate is None:
            return None
        try:
            with torch.no_grad():
                return float(self.evaluate(self.model))
        finally:
            self._put_flags_back()

    def _put_flags_back(self) -> None:
        for module, flag in self._flags.items():
            module.training = flag

    def stage(self) -> None:
        number, began = len(self.records) + 1, time.perf_counter()
        fraction, sparsity = self.plan.fractions[number - 1], self.plan.sparsities[number - 1]
        self.progress(number - 1, len(self.plan), f"stage {number}: to {100 * sparsity:.4g} %")
        before = None if self.folder is not None else take_snapshot(self.model)
        earlier = {name: mask.mask for name, mask in self.masks.items()}
        assert self.held is not None
        try:
            masks = self.pruner.compute_masks(self.model, sparsity, within=earlier)
            self.held.update(masks)
            self.finetune(self.model, number)
            self._put_flags_back()
            strayed = self.held.enforce()
            score = self._evaluated()
        except BaseException:
            self._go_back(before)
            self.held.release()
            raise
        drop = self._drop(score)
        accepted = self.max_drop is None or drop <= self.max_drop  # NaN is a drop
        entry = record(masks, earlier, sparsity)
        done = StageResult(
            stage=number,
            fraction=fraction,
            score=score,
            seconds=time.perf_counter() - began,
            accepted=accepted,
            **entry,
        )
        self.records.append(done)
        self.ended = not accepted or number == len(self.plan)
        if accepted:
            self.masks = self.held.masks
            if self.folder is not None:
                self.folder.add(self.model, self.masks, asdict(done), ended=self.ended)
        else:
            self._go_back(before)
            if self.folder is not None:
                self.folder.reject(asdict(done))
        self.progress(number, len(self.plan), f"stage {number}: {'kept' if accepted else 'taken back'}")
        if strayed:  # last, so that a warning turned into an error leaves everything in order
            warnings.warn(
                f"{strayed} pruned weights were not 0 after stage {number} and were set back: finetune_fn changed them "
                "by other means than a torch.optim.Optimizer",
                stacklevel=3,
            )

    def _drop(self, score: float | None) -> float:
        if score is None or self.baseline is None:
            return 0.0
        drop = self.baseline - score if self.higher_is_better else score - self.baseline
        return math.inf if math.isnan(drop) else drop

    def _go_back(self, before: dict[str, Tensor] | None) -> None:
        """The model as it was before this stage, and its masks held."""
        assert self.held is not None
        self.held.release()
        if self.folder is not None:
            self.folder.restore(self.model, randomness=False)
        else:
            assert before is not None
            self.model.load_state_dict(before)
        self._put_flags_back()
        self.held = HeldMasks(self.model, self.masks)

    def result(self) -> IterativeResult:
        return IterativeResult(
            plan=self.plan,
            masks={name: mask.mask for name, mask in self.masks.items()},
            stages=tuple(self.records),
            baseline=self.baseline,
            stats=CompressionStats.of(self.masks, self.model),
            held=self.held,
        )
