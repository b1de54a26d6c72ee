"""Splits without leaks, features that look at the past only, and what the files hold."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resu.experiments.spinn.recordings import RECORDINGS, load_recording
from resu.experiments.spinn.signals import integral, lagged, per_sequence, scaled


def test_lagged_is_the_answer_of_a_first_order_system():
    t = np.arange(400) * 0.01
    step = np.ones((400, 1))
    step[0] = 0
    assert np.allclose(lagged(step, 0.5, 0.01)[:, 0], 1 - np.exp(-t / 0.5), atol=1e-12)
    with pytest.raises(ValueError, match="positive"):
        lagged(step, 0.0, 0.01)


def test_integral_is_exact_for_straight_lines():
    t = np.array([0.0, 1.0, 2.5, 4.0])
    assert np.allclose(integral(2 * t + 1, t), t**2 + t, atol=1e-12)


@given(st.integers(1, 30), st.integers(0, 2**16))
def test_scaling_knows_nothing_of_rows_outside_training(cut, seed):
    make = np.random.default_rng(seed)
    x = make.standard_normal((32, 3)) * [1, 100, 0] + 5
    train = np.arange(cut)
    other = x.copy()
    other[cut:] = make.standard_normal((32 - cut, 3)) * 1e6
    a, b = scaled(x, train), scaled(other, train)
    assert np.array_equal(a[:cut], b[:cut])
    assert np.abs(b).max() <= 5
    assert (a[:, 2] == 0).all()  # a constant column


def test_sequences_must_lie_together():
    pieces = per_sequence(np.array([3, 3, 1]), np.array([1.0, 2.0, 9.0]))
    assert [piece[0].tolist() for piece in pieces] == [[1, 2], [9]]
    with pytest.raises(ValueError, match="lie together"):
        per_sequence(np.array([3, 1, 3]), np.zeros(3))


def test_what_a_recording_of_ones_own_gets_wrong(recording):
    def wrong(**changed):
        return dataclasses.replace(recording, **changed)

    with pytest.raises(ValueError, match=r"targets must have the shape \[240, 1\] .*, got \[240\]"):
        wrong(targets=recording.targets[:, 0])
    with pytest.raises(ValueError, match=r"drive must have the shape \[240, 1\] .*, got \[240, 2\]"):
        wrong(drive=np.c_[recording.drive, recording.drive])
    with pytest.raises(ValueError, match=r"group must have the shape \[240\]"):
        wrong(group=recording.group[:-1])
    time = recording.time.copy()
    time[45] = time[44]
    with pytest.raises(ValueError, match="time does not rise from row to row in sequence 1"):
        wrong(time=time)
    with pytest.raises(ValueError, match="lie together"):
        wrong(sequence=recording.sequence % 2)


def test_values_that_are_missing_are_refused_where_they_are_learned_from(recording):
    inputs, targets = recording.inputs.copy(), recording.targets.copy()
    inputs[[43, 44], 1] = np.nan
    with pytest.raises(ValueError, match=r"work is nan in row 43 \(tool 1; 2 rows have such values\)"):
        dataclasses.replace(recording, inputs=inputs).prepare()
    targets[170] = np.inf
    with pytest.raises(ValueError, match=r"flank wear is inf in row 170 \(tool 4; 1 rows"):
        dataclasses.replace(recording, targets=targets).prepare()
    targets[170], targets[230:] = 1.0, np.nan  # the rest of a new tool's life
    assert len(dataclasses.replace(recording, targets=targets).prepare().test) == 40


def test_a_group_is_in_one_part_only(recording):
    data = recording.prepare()
    parts = [set(recording.group[rows].tolist()) for rows in (data.train, data.val, data.test)]
    assert parts == [{0, 1, 2, 3}, {4}, {5}]
    with pytest.raises(ValueError, match=r"tool \[1\] is in two parts"):
        recording.prepare(((0, 1), (), (1,)))
    with pytest.raises(ValueError, match=r"no tool \[9\]"):
        recording.prepare(((0,), (), (9,)))
    with pytest.raises(ValueError, match="at least one tool"):
        recording.prepare(((0,), (1,), ()))


def test_pairs_stay_within_a_sequence_and_a_part(recording):
    data = recording.prepare()
    for rows in (data.train, data.val, data.test):
        ends = data.pairs(rows)
        assert len(ends) == len(rows) - 4 * len(set(recording.group[rows].tolist()))
        assert (data.time[ends[:, 1]] - data.time[ends[:, 0]] == 4).all()
        assert set(ends.flatten().tolist()) <= set(rows.tolist())
    gap = torch.cat([torch.arange(10), torch.arange(12, 20)])
    assert all({int(a), int(b)} <= set(gap.tolist()) for a, b in data.pairs(gap))


@pytest.fixture(scope="module")
def loaded(data_folder):
    for folder in ("tool_wear_vicomtech", "nasa_milling", "thermal_displacement_caiviac"):
        data_folder(folder)
    return {name: load_recording(name, data_folder("nasa_milling").parent) for name in RECORDINGS}


@pytest.mark.parametrize(("name", "shape"), [("wear", (2054, 1)), ("milling", (670, 1)), ("thermal", (11115, 5))])
def test_real_recordings(loaded, name, shape):
    found = loaded[name]
    assert found.targets.shape == shape
    assert found.inputs.shape == (shape[0], len(found.features))
    assert found.drive.shape == (shape[0], len(found.drives))
    assert np.isfinite(found.inputs).all()
    data = found.prepare()
    assert sorted(torch.cat([data.train, data.val, data.test]).tolist()) == list(range(shape[0]))
    for number in np.unique(found.sequence):
        time = found.time[found.sequence == number]
        assert (np.diff(time) > 0).all()
    assert len(data.pairs(data.train)) > 100


def test_displacement_is_split_in_time_and_nothing_of_its_future_is_seen(loaded):
    data = loaded["thermal"].prepare()
    assert data.train.max() < data.val.min() <= data.val.max() < data.test.min()
    assert [len(rows) for rows in (data.train, data.val, data.test)] == [6669, 1111, 3335]


def test_milling_takes_no_column_that_was_not_measured(loaded):
    assert not any("thermal" in name or "heat" in name for name in loaded["milling"].features)
    assert loaded["milling"].unit == "mm"


def test_features_are_causal(loaded, monkeypatch):
    """What comes later changes nothing before it."""
    from resu.experiments.spinn import recordings

    whole = loaded["thermal"]
    plain = recordings._arrays

    def cut(*path):
        found = dict(plain(*path))
        return {name: x[:5000] if len(x) > 5000 else x for name, x in found.items()}

    monkeypatch.setattr(recordings, "_arrays", cut)
    folder = _folder()
    early = load_recording("thermal", folder)
    assert np.array_equal(early.inputs, whole.inputs[:5000])


def _folder():
    from tests.conftest import default_data_dir

    return default_data_dir()


def test_what_is_absent_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="tool_wear_vicomtech"):
        load_recording("wear", tmp_path)
    with pytest.raises(ValueError, match="unknown recording 'heat'; known: wear, milling, thermal"):
        load_recording("heat", tmp_path)


def test_a_recording_is_frozen(recording):
    with pytest.raises(dataclasses.FrozenInstanceError):
        recording.unit = "mm"
