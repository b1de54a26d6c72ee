"""What the product promises on real data: the digits that ship with scikit-learn."""

from __future__ import annotations

import statistics

import pytest
import torch

from resu.core.counting import pruned_count
from resu.experiments.recipes import run
from resu.experiments.tasks import tasks

pytest.importorskip("sklearn", reason="the digits ship with scikit-learn")

SEEDS = (0, 1)


@pytest.fixture(scope="module")
def accuracies() -> dict[str, float]:
    """Mean test accuracy of each method at 50 %, all with the same steps."""
    torch.set_num_threads(1)
    methods = ("dense", "inline", "qresu", "qresu-selective", "resu")
    return {m: statistics.fmean(run("digits", m, 0.5, seed, "scratch").test for seed in SEEDS) for m in methods}


@pytest.mark.parametrize("method", ["inline", "qresu", "qresu-selective", "resu"])
def test_at_half_sparsity_every_resurrection_is_within_two_points_of_dense(
    accuracies: dict[str, float], method: str
) -> None:
    assert accuracies["dense"] > 94
    assert accuracies[method] > accuracies["dense"] - 2


@pytest.mark.parametrize("method", ["inline", "qresu", "qresu-selective", "resu", "gradual"])
def test_at_80_percent_the_sparsity_is_exact_to_one_weight(method: str) -> None:
    task = tasks["digits"].shortened(10)
    row = run(task, method, 0.8, 0, "scratch")
    total = 64 * 128 + 128 * 64 + 64 * 10
    assert row.actual_sparsity == pytest.approx(pruned_count(total, 0.8) / total, abs=1e-8)
    assert row.zeros_exact
