"""Every tool in turn is a new one: adapted to and retrained for, with shares that know nothing of its life.

The shares for a tool are those that are best for the others, each of them new to a twin that knows neither of the two.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from resu.experiments.spinn.adaptation import CANDIDATES, compare_adaptation, error_products
from resu.experiments.spinn.fitting import Recipe
from resu.experiments.spinn.mixing import best_single, mixture
from resu.experiments.spinn.recording import Prepared
from resu.experiments.spinn.recordings import load_recording
from resu.experiments.spinn.results import KnownToolRow, NewToolRow
from resu.experiments.spinn.runs import dense_twin
from resu.experiments.spinn.sparse import prune_in_stages
from resu.experiments.spinn.twin import Twin

__all__ = ["LIVES", "known_tool_rows", "new_tool_rows", "products_without"]

#: Tools, and cases of at least four runs: shorter lives have no first part and rest to speak of.
LIVES = {
    "wear": (3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16),
    "milling": (1, 3, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15),
}
SEEDS = 3


def _sparse_twin(data: Prepared, recipe: Recipe, seed: int) -> Twin:
    twin = dense_twin(data, recipe, seed, physics=True)
    prune_in_stages(twin, data, recipe).release()
    return twin


def known_tool_rows(folder: str | os.PathLike[str], name: str, group: int, recipe: Recipe) -> list[KnownToolRow]:
    """For each tool after ``group``, a twin without the two: what every candidate does for either."""
    recording, found = load_recording(name, folder), []
    for other in LIVES[name][LIVES[name].index(group) + 1 :]:
        began = time.process_time()
        data = recording.without([group, other])
        twin = _sparse_twin(data, recipe, 0)
        products = {new: tuple(error_products(twin, data, new).flatten().tolist()) for new in (group, other)}
        spent = (time.process_time() - began) / 2
        found += [KnownToolRow(name, a, b, products[a], spent) for a, b in ((group, other), (other, group))]
    return found


def products_without(rows: Sequence[KnownToolRow], name: str, group: int) -> list[Tensor]:
    """Products of errors for all other tools, in twins that know neither them nor ``group``.

    Raises:
        ValueError: If a tool is missing.
    """
    found = {row.group: row.products for row in rows if (row.quantity, row.other) == (name, group)}
    if missing := sorted(set(LIVES[name]) - {group} - set(found)):
        raise ValueError(
            f"{name} without {group} and {missing[0]} has not been run; run the study of known tools first"
        )
    return [torch.tensor(found[g], dtype=torch.float64).view(CANDIDATES, CANDIDATES) for g in sorted(found)]


def new_tool_rows(
    folder: str | os.PathLike[str], name: str, group: int, recipe: Recipe, known: Sequence[KnownToolRow]
) -> list[NewToolRow]:
    """A tool that the sparse twin does not know, once per seed: adapted to, and retrained for, by its first 30 %."""
    data, products = load_recording(name, folder).without([group]), products_without(known, name, group)
    mixed, rows = mixture(products), []
    for seed in range(SEEDS):
        twin = _sparse_twin(data, recipe, seed)
        began = time.process_time()
        ways = [mixed, None, best_single(products)]
        found = compare_adaptation(twin, data, group, ways, recipe, seed=seed)
        rows.append(
            NewToolRow(
                quantity=name,
                group=group,
                seed=seed,
                rest=found.rest,
                before=found.before,
                mixed=found.adapted[0],
                equal=found.adapted[1],
                single=found.adapted[2],
                retrained=found.retrained,
                cost=found.cost,
                time=found.time,
                shares=tuple(round(share, 4) for share in mixed.tolist()),
                seconds=time.process_time() - began,
            )
        )
    return rows
