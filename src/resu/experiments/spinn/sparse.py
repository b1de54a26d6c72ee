"""Ways from a trained dense twin to a smaller one: staged pruning, neurons removed, resurrection."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence

import torch
from torch import nn

from resu.experiments.spinn.fitting import Recipe, fit
from resu.experiments.spinn.recording import Prepared
from resu.experiments.spinn.twin import Twin, score
from resu.pruning.magnitude_pruner import MagnitudePruner
from resu.pruning.stage_plan import StagePlan, plan_stages
from resu.pruning.stages import IterativeResult, prune_iteratively

__all__ = ["STAGES", "TARGET", "kept", "prune_in_stages", "resurrect", "validated"]

TARGET = 0.7
STAGES = 4
_WEIGHTS = "network.*"  # the constants of a law are not pruned


def validated(data: Prepared) -> Callable[[nn.Module], float]:
    """What a stage is judged by: R² on the validation part against the variance of the training part."""
    rows = data.val if len(data.val) else data.train

    def evaluate(model: nn.Module) -> float:
        with torch.no_grad():
            found = model(data.inputs[rows])
        return score(found, data.targets[rows], data.targets[data.train])

    return evaluate


def prune_in_stages(
    twin: Twin,
    data: Prepared,
    recipe: Recipe,
    *,
    plan: StagePlan | Sequence[float] | int = STAGES,
    target: float = TARGET,
    checkpoints: str | os.PathLike[str] | None = None,
    resume: bool = True,
    overwrite: bool = False,
    max_drop: float | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> IterativeResult:
    """Prune ``twin`` in place by magnitude, in cumulative stages, each fine-tuned under its masks and law.

    Args:
        twin: A trained one.
        data: What it was trained on.
        recipe: ``tune`` steps after each stage.
        plan: Stages, their fractions, or how many.
        target: Final sparsity of the network's weights, exact.
        checkpoints: Folder for a checkpoint per stage; a run that was killed goes on there.
        resume, overwrite: As in :func:`~resu.pruning.stages.prune_iteratively`.
        max_drop: How much R² on the validation part a stage may cost before it is taken back and the run ends.
        progress: Called ``(done, total, what)``.

    Raises:
        ValueError: If fractions miss the target, with the figure they reach.
    """
    stages = plan if isinstance(plan, StagePlan) else plan_stages(target, plan)

    def tune(model: nn.Module) -> None:
        assert isinstance(model, Twin)
        fit(model, data, recipe, steps=recipe.tune, rate=recipe.tune_rate)

    return prune_iteratively(
        twin,
        stages,
        tune,
        pruner=MagnitudePruner(stages.target, include=_WEIGHTS),
        eval_fn=validated(data),
        max_drop=max_drop,
        checkpoint_dir=checkpoints,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )


def resurrect(twin: Twin, data: Prepared, recipe: Recipe, *, sparsity: float = TARGET, seed: int = 0) -> Twin:
    """A copy pruned at once, in which pruned weights keep learning and compete to come back (dormant RESU).

    It takes as many steps as all stages of :func:`prune_in_stages` together; the mask rests in the last 15 % of them.
    """
    from resu.training import RESU, Sparsifier

    twin = copy.deepcopy(twin)
    steps = STAGES * recipe.tune
    held: list[Sparsifier] = []

    def attach(optimizer: torch.optim.Optimizer) -> None:
        rule = RESU(sparsity=sparsity, initial_sparsity=None, end_step=max(1, round(0.85 * steps)))
        held.append(Sparsifier(twin, optimizer, rule, distribution="uniform", include=_WEIGHTS, seed=seed))

    fit(twin, data, recipe, steps=steps, rate=recipe.tune_rate, on_optimizer=attach)
    held[0].commit()
    return twin


def kept(twin: Twin) -> int:
    """Parameters of the network that are left: biases, and weights that are not exactly 0.

    Of a trained network; a weight that is kept and happens to be 0.0 is one in some billions.
    """
    return sum(int((p != 0).sum()) if p.ndim == 2 else p.numel() for p in twin.network.parameters())
