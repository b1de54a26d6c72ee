"""What a run of iterative pruning tells: a record per stage, masks, bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from resu.pruning.compression import CompressionStats, table
from resu.pruning.holding import HeldMasks
from resu.pruning.stage_plan import StagePlan

__all__ = ["IterativeResult", "StageResult"]


@dataclass(frozen=True)
class StageResult:
    """What one stage did.

    Attributes:
        stage: 1, 2, ….
        fraction: Of the weights still active, as planned.
        sparsity: As planned; ``actual`` is what the masks have.
        kept: Weights kept, of ``numel``.
        score: What ``eval_fn`` said after fine-tuning; None without one.
        seconds: Pruning, fine-tuning and evaluation.
        accepted: False: it cost more than ``max_drop`` and was taken back.
        layers: ``{name: {"kept", "numel", "sparsity"}}``.
    """

    stage: int
    fraction: float
    sparsity: float
    actual: float
    kept: int
    numel: int
    newly_pruned: int
    score: float | None
    seconds: float
    accepted: bool
    layers: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class IterativeResult:
    """Masks, stages and statistics; ``print`` it for tables.

    Attributes:
        masks: ``{parameter name: bool mask}`` of the last accepted stage; empty if none was.
        stages: One entry per stage that ran, a rejected one among them.
        baseline: What ``eval_fn`` said before the first stage.
        stats: Bytes in each layout.
    """

    plan: StagePlan
    masks: dict[str, Tensor]
    stages: tuple[StageResult, ...]
    baseline: float | None
    stats: CompressionStats
    held: HeldMasks | None = field(repr=False, default=None)

    @property
    def rolled_back(self) -> bool:
        """Whether the last stage was taken back."""
        return bool(self.stages) and not self.stages[-1].accepted

    @property
    def history(self) -> list[dict[str, Any]]:
        """The stages as plain JSON."""
        return [asdict(stage) for stage in self.stages]

    def release(self) -> None:
        """Let go of the masks, which otherwise hold in whatever trains the model next."""
        if self.held is not None:
            self.held.release()

    def __str__(self) -> str:
        head = ["stage", "of active", "planned", "sparsity", "kept", "score", "seconds", ""]
        before = ["0", "", "", "0.0000", "", _shown(self.baseline), "", ""]
        rows = [
            [
                *(f"{x.stage}", f"{x.fraction:.4f}", f"{x.sparsity:.4f}", f"{x.actual:.4f}", f"{x.kept}"),
                *(_shown(x.score), f"{x.seconds:.1f}", "" if x.accepted else "taken back"),
            ]
            for x in self.stages
        ]
        return "\n".join([*table(head, [before, *rows]), "", str(self.stats)])


def _shown(score: float | None) -> str:
    return "" if score is None else f"{score:.4f}"
