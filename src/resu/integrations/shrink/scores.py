"""Scores of heads and neurons by name; higher means keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from resu.core.counting import check_finite
from resu.core.registry import Registry
from resu.integrations.shrink.activity import output_energies
from resu.integrations.shrink.families import Site, sites_of
from resu.integrations.shrink.taylor import taylor_scores
from resu.integrations.shrink.weights import random_scores, weight_norms

__all__ = ["Calibration", "UnitScore", "score_units", "unit_scores"]

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Calibration:
    """What scores may look at.

    Attributes:
        batches: ``input_ids`` and ``attention_mask``, int64 ``[batch, tokens]`` each.
        seed: Of random numbers.
        progress: Called with (done, total, what).
    """

    batches: Sequence[Mapping[str, Tensor]] = ()
    seed: int = 0
    progress: Progress | None = None


@dataclass(frozen=True)
class UnitScore:
    """A score per unit.

    Attributes:
        function: ``(model, sites, calibration) -> {site name: float64 [units]}``.
        needs_data: Whether it looks at batches.
    """

    function: Callable[[Any, Sequence[Site], Calibration], dict[str, Tensor]]
    needs_data: bool = False


#: By name.
unit_scores: Registry[UnitScore] = Registry("score of heads and neurons")
unit_scores.register("l1")(UnitScore(lambda model, sites, data: weight_norms(model.base_model, sites, 1)))
unit_scores.register("l2")(UnitScore(lambda model, sites, data: weight_norms(model.base_model, sites, 2)))
unit_scores.register("random")(UnitScore(lambda model, sites, data: random_scores(sites, data.seed)))
unit_scores.register("activation")(
    UnitScore(lambda model, sites, data: output_energies(model, sites, data.batches, data.progress), needs_data=True)
)
unit_scores.register("taylor")(
    UnitScore(
        lambda model, sites, data: taylor_scores(model, sites, data.batches, data.seed, data.progress),
        needs_data=True,
    )
)


def score_units(model: Any, method: str, calibration: Calibration | None = None) -> dict[str, Tensor]:
    """Scores of all heads and neurons of a model, which is as before afterwards.

    Args:
        model: A ``PreTrainedModel`` of a known family.
        method: A name in :data:`unit_scores`.
        calibration: Batches, for scores that look at data.

    Returns:
        ``{site name: float64 [units]}`` on the CPU.

    Raises:
        ValueError: On an unknown method, one that needs data without any, or scores that are not finite.
    """
    score, data = unit_scores[method], calibration or Calibration()
    if score.needs_data and not data.batches:
        known = ", ".join(name for name in unit_scores if not unit_scores[name].needs_data)
        raise ValueError(f"{method!r} looks at data: give a calibration text, or a score that does not ({known})")
    found = score.function(model, sites_of(model), data)
    for name, scores in found.items():
        check_finite(scores, f"scores of {name}")
    return found
