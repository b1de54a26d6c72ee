"""Rolling origins: what is judged comes after what trains, and the test part is in none of them."""

import copy
import dataclasses
from functools import partial

import numpy as np
import torch

from resu.experiments.spinn import runs
from resu.experiments.spinn.origins import far_origins, rolling_origins
from resu.experiments.spinn.ridge import PENALTIES, ridge, ridge_penalty, ridge_weights
from tests.experiments.spinn.test_closed_form import warm


def test_they_are_four_and_stay_before_the_test_part():
    recording = warm()
    known = len(recording.rows([0, 1]))
    splits = rolling_origins(recording)
    assert len(splits) == 4
    for number, split in enumerate(splits):
        assert split.train.tolist() == list(range(known * (3 + number) // 7))
        assert split.test.tolist() == list(range(known * (3 + number) // 7, known * (4 + number) // 7))
        assert len(split.val) == 0
        assert len(split.inputs) == len(split.time) == len(split.drive) == split.test[-1] + 1 <= known
        assert np.allclose(split.inputs[split.train].mean(0), 0, atol=1e-6)  # scaled by what is known by then
    assert splits[-1].test[-1] + 1 == known


def test_far_ones_leave_a_block_out():
    recording = warm()
    known = len(recording.rows([0, 1]))
    for number, split in enumerate(far_origins(recording)):
        assert split.train.tolist() == list(range(known * (3 + number) // 7))
        assert split.test.tolist() == list(range(known * (4 + number) // 7, known))
        assert len(split.inputs) == known


def test_several_series_have_none(recording):
    assert rolling_origins(recording) == []


def test_ridge_takes_the_penalty_that_is_best_over_origins():
    data = warm().prepare()
    spread = data.targets[data.train].double().var(0)

    def lost(penalty):
        total = 0.0
        for split in rolling_origins(data.recording):
            x, y = split.inputs.double() / 0.1, split.targets.double()
            w, b = ridge_weights(x[split.train], y[split.train], penalty)
            total += float(((x[split.test] @ w + b - y[split.test]).square().mean(0) / spread).mean())
        return total

    assert ridge_penalty(data) == min(PENALTIES, key=lost)


def test_ridge_of_a_series_never_looks_at_the_test_part():
    data = warm().prepare()
    recording = dataclasses.replace(data.recording, targets=data.recording.targets.copy())
    recording.targets[data.test.numpy()] = 1e6
    spoiled = copy.deepcopy(recording.prepare())
    assert ridge_penalty(data) == ridge_penalty(spoiled)
    assert torch.equal(ridge(data, 3.0), ridge(spoiled, 3.0))


def test_rows_of_the_origins(monkeypatch):
    monkeypatch.setattr(runs, "load_recording", lambda name, folder: warm())
    monkeypatch.setattr(runs, "dense_twin", partial(runs.dense_twin, hidden=(16, 8)))
    rows = runs.origin_rows("data", "thermal", 0)
    assert [(row.way, row.physics) for row in rows] == [("ridge", False), ("dense", False), ("dense", True)]
    assert [(row.way, row.seed) for row in runs.origin_rows("data", "thermal", 1)] == [("dense", 1)] * 2
    assert all((len(row.near), len(row.far)) == (4, 3) for row in rows)
    assert len({row.near for row in rows}) == 3
