"""Every tool in turn is a new one: adapted to and retrained for, with a strength that knows nothing of its life.

The strength for a tool is the best for the others, each of them new to a twin that knows neither of the two.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Sequence

from resu.experiments.spinn.adaptation import Strength, compare_adaptation, squared_errors
from resu.experiments.spinn.fitting import Recipe
from resu.experiments.spinn.recording import Prepared
from resu.experiments.spinn.recordings import load_recording
from resu.experiments.spinn.runs import Row, dense_twin
from resu.experiments.spinn.sparse import TARGET, kept, prune_in_stages
from resu.experiments.spinn.twin import Twin

__all__ = ["BY", "LIVES", "adaptation_rows", "best_strength", "strength_rows"]

#: Tools, and cases of at least four runs: shorter lives have no first part and rest to speak of.
LIVES = {
    "wear": (3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16),
    "milling": (1, 3, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15),
}
SEEDS = 3
BY = ("sum", "geometric mean")
#: Times that a row of a new tool counts in retraining: of 1, 3, 10 and 30 the best for retraining itself, on the tools
#: and cases outside the test part.
RETRAIN_WEIGHT = 10


def _sparse_twin(data: Prepared, recipe: Recipe, seed: int) -> Twin:
    twin = dense_twin(data, recipe, seed, physics=True)
    prune_in_stages(twin, data, recipe).release()
    return twin


def strength_rows(folder: str | os.PathLike[str], name: str, group: int, recipe: Recipe) -> list[Row]:
    """A twin without the group and without each later one: what every strength does for either."""
    recording, found = load_recording(name, folder), []
    for other in LIVES[name][LIVES[name].index(group) + 1 :]:
        began = time.process_time()
        data = recording.without([group, other])
        twin = _sparse_twin(data, recipe, 0)
        for new in (group, other):
            errors = squared_errors(twin, data, new)
            told = ", ".join(f"{s.weight}x{s.penalty:g} {error:.5g}" for s, error in errors.items())
            found.append(
                Row(
                    *("strength", name, "sparse", True, 0, f"{group} {other}", TARGET, kept(twin), float("nan")),
                    *(float("nan"), f"adapted to {new}, squared errors: {told}", time.process_time() - began),
                )
            )
    return found


def best_strength(rows: Sequence[Row], name: str, group: int, by: str = BY[0]) -> Strength:
    """What is best for all other tools together, in twins that know neither them nor ``group``.

    Args:
        rows: Of the study ``"strength"``.
        name: Recording.
        group: The new tool.
        by: ``"sum"`` of squared errors, as results are counted; or their ``"geometric mean"``, in which no tool weighs
            more than another.

    Raises:
        ValueError: If there are no such rows.
    """
    total: dict[Strength, float] = defaultdict(float)
    for row in rows:
        if row.study != "strength" or row.quantity != name or str(group) not in row.group.split():
            continue
        if row.detail.startswith(f"adapted to {group},"):
            continue
        for weight, penalty, error in re.findall(r"(\d+)x(\S+) ([^,\s]+)", row.detail):
            lost = float(error) if by == "sum" else math.log(max(float(error), 1e-12))
            total[Strength(int(weight), float(penalty))] += lost
    if not total:
        raise ValueError(f"no strength has been tried without {group} of {name}; run the study 'strength' first")
    return min(total, key=lambda strength: total[strength])


def adaptation_rows(
    folder: str | os.PathLike[str], name: str, group: int, recipe: Recipe, strengths: Sequence[Strength]
) -> list[Row]:
    """A tool that the sparse twin does not know, three times over: adapted to, and retrained for, by its first 30 %.

    Strengths are those :data:`BY` each criterion.
    """
    data, found = load_recording(name, folder).without([group]), []
    for seed in range(SEEDS):
        twin = _sparse_twin(data, recipe, seed)
        began = time.process_time()
        result = compare_adaptation(twin, data, group, strengths, recipe, seed=seed, weight=RETRAIN_WEIGHT)
        told = (
            f"RMSE {data.recording.unit}: before {result.before:.5g}, adapted "
            f"{' / '.join(f'{error:.5g}' for error in result.adapted)}, retrained {result.retrained:.5g}, over "
            f"{result.rest} rows; multiply-adds {result.cost:.4f}, processor time {result.seconds:.4f}; weight · "
            f"penalty {' / '.join(f'{s.weight} · {s.penalty:g}' for s in strengths)}"
        )
        gain = result.before**2 - result.retrained**2
        recovered = (result.before**2 - result.adapted[0] ** 2) / gain if gain > 0 else float("nan")
        found.append(
            Row(
                *("adaptation", name, "sparse", True, seed, str(group), TARGET, kept(twin)),
                *(recovered, float("nan"), told, time.process_time() - began),
            )
        )
    return found
