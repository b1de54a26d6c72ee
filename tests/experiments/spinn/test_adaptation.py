"""A new tool: what changes, what stays, how the strength is told, and what it costs."""

import copy
import dataclasses
from functools import partial

import pytest
import torch

from resu.experiments.rows import read
from resu.experiments.spinn import new_tools, runs
from resu.experiments.spinn.adaptation import (
    STRENGTHS,
    Strength,
    adapt,
    adapting_cost,
    compare_adaptation,
    first_part,
    retrain,
    squared_errors,
    training_cost,
)
from resu.experiments.spinn.closed_form import solving_cost
from resu.experiments.spinn.jobs import jobs, one
from resu.experiments.spinn.new_tools import best_strength
from resu.experiments.spinn.ridge import ridge_weights
from resu.experiments.spinn.runs import Row, dense_twin
from tests.experiments.spinn.conftest import made_up
from tests.experiments.spinn.test_sparse import HIDDEN, RECIPE, twin_of


def test_it_changes_the_output_layer_alone(data):
    twin = twin_of(data)
    with torch.no_grad():
        twin.network[4].weight[0, :5] = 0
    before = copy.deepcopy(twin.state_dict())
    adapted = adapt(twin, data, first_part(data, 5)[0], Strength(3, 100.0))
    assert all(torch.equal(before[name], value) for name, value in twin.state_dict().items())
    changed = {name for name, value in adapted.state_dict().items() if not torch.equal(before[name], value)}
    assert changed == {"network.4.weight", "network.4.bias"}
    assert torch.equal(adapted.network[4].weight == 0, twin.network[4].weight == 0)


def test_the_layer_is_weighted_ridge(data):
    """Rows that count three times are rows whose square root of three times error is squared."""
    twin = twin_of(data)
    rows = first_part(data, 5)[0]
    adapted = adapt(twin, data, rows, Strength(3, 20.0))
    every = torch.cat([data.train, rows, rows, rows])
    hidden = twin.network[:-1](data.inputs).detach().double()
    wanted = ((data.targets - twin.mean) / twin.scale).double()
    w, b = ridge_weights(hidden[every], wanted[every], 20.0 * float(hidden[every].var(0).mean()))
    assert torch.allclose(adapted.network[4].weight.double().T, w, rtol=1e-4, atol=1e-5)
    assert torch.allclose(adapted.network[4].bias.double(), b, rtol=1e-4, atol=1e-5)


def test_errors_of_every_strength_are_those_of_adapting(data):
    twin = twin_of(data)
    with torch.no_grad():
        twin.network[4].weight[0, :5] = 0
    found = squared_errors(twin, data, 5)
    assert tuple(found) == STRENGTHS
    rows, rest = first_part(data, 5)
    for strength in (STRENGTHS[0], STRENGTHS[-1]):
        missed = adapt(twin, data, rows, strength).predict(data.inputs[rest]) - data.targets[rest]
        assert found[strength] == pytest.approx(float(missed.double().square().sum()), rel=1e-3)


def test_nothing_of_the_rest_of_a_life_is_learned_from(data):
    twin = twin_of(data)
    rows, rest = first_part(data, 5)
    assert len(rows) + len(rest) == 40
    assert data.time[rows].max() < data.time[rest].min()
    spoiled = copy.deepcopy(data)
    spoiled.targets[rest] = 1e6
    one, other = (adapt(twin, d, rows, Strength(10, 100.0)) for d in (data, spoiled))
    assert torch.equal(one.network[4].weight, other.network[4].weight)
    still = dataclasses.replace(RECIPE, steps=5)
    one, other = (retrain(twin, d, rows, still, 0, 10) for d in (data, spoiled))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_comparison_counts_what_it_says(data):
    twin = twin_of(data)
    rows, rest = first_part(data, 5)
    result = compare_adaptation(twin, data, 5, [Strength(2, 100.0), Strength(1, 10.0)], RECIPE, weight=3)
    assert len(result.adapted) == 2
    assert (result.group, result.rows, result.rest) == (5, len(rows), len(rest))
    full = training_cost(twin.network, 32, 60) + solving_cost(twin.network, 160 + len(rows))
    assert result.cost == adapting_cost(twin, 160, len(rows), 2) / full


def test_costs_by_hand():
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    assert training_cost(network, 10, 7) == 3 * 8 * 10 * 7
    assert solving_cost(network, 10) == 8 * 10 + 10 * 4 + 7 * (8 // 3)


def test_cost_of_adapting_by_hand(data):
    twin = twin_of(data)
    with torch.no_grad():
        twin.network[4].weight[0, :6] = 0
    weights = 4 * 24 + 24 * 16 + 16
    assert adapting_cost(twin, 160, 12, 5) == weights * 172 + 220 * 10**2 + 10**3 // 3


def strength_row(pair, new, told):
    detail = f"adapted to {new}, squared errors: {told}"
    return Row("strength", "wear", "sparse", True, 0, pair, 0.7, 30, float("nan"), float("nan"), detail, 1.0)


def test_the_strength_for_a_tool_is_the_best_for_the_others():
    rows = [
        strength_row("3 4", 3, "1x10 5, 10x1000 1"),
        strength_row("3 4", 4, "1x10 2, 10x1000 9"),
        strength_row("3 5", 3, "1x10 1e-3, 10x1000 9"),
        strength_row("3 5", 5, "1x10 2, 10x1000 3"),
        strength_row("4 5", 4, "1x10 7, 10x1000 1"),
        strength_row("4 5", 5, "1x10 90, 10x1000 80"),
    ]
    assert best_strength(rows, "wear", 3) == Strength(1, 10.0)  # 2 + 2 against 9 + 3
    assert best_strength(rows, "wear", 4) == Strength(10, 1000.0)  # 5 + 90 against 1 + 80
    assert best_strength(rows, "wear", 5) == Strength(1, 10.0)  # 0.001 + 7 against 9 + 1
    rows[5] = strength_row("4 5", 5, "1x10 10, 10x1000 80")
    assert best_strength(rows, "wear", 4) == Strength(1, 10.0)  # 5 + 10 against 1 + 80
    assert best_strength(rows, "wear", 4, "geometric mean") == Strength(1, 10.0)  # 5 · 10 against 1 · 80
    rows[0] = strength_row("3 4", 3, "1x10 20, 10x1000 1")
    assert best_strength(rows, "wear", 4) == Strength(1, 10.0)  # 20 + 10 against 1 + 80
    assert best_strength(rows, "wear", 4, "geometric mean") == Strength(10, 1000.0)  # 20 · 10 against 1 · 80
    with pytest.raises(ValueError, match="run the study 'strength' first"):
        best_strength(rows, "milling", 3)


def test_every_tool_in_turn_is_new(tmp_path, monkeypatch):
    monkeypatch.setattr(new_tools, "load_recording", lambda name, folder: made_up())
    monkeypatch.setitem(new_tools.LIVES, "wear", (0, 4, 5))
    monkeypatch.setattr(new_tools, "dense_twin", partial(dense_twin, hidden=HIDDEN))
    monkeypatch.setattr(new_tools, "SEEDS", 2)
    monkeypatch.setitem(runs.RECIPES, "wear", dataclasses.replace(RECIPE, steps=3, tune=1))
    csv = tmp_path / "rows.csv"
    first, second = jobs(["wear"], [], 0, [])
    strengths = [job for job in first if job[0] == "strength"]
    assert strengths == [("strength", "wear", True, 0), ("strength", "wear", True, 4)]
    assert second == [("adaptation", "wear", True, g) for g in (0, 4, 5)]
    for job in (*strengths, *second):
        one((tmp_path, csv), *job)
    rows = read(csv, Row)
    assert sorted((r.group, r.detail.split(",")[0]) for r in rows if r.study == "strength") == [
        (pair, f"adapted to {new}") for pair in ("0 4", "0 5", "4 5") for new in pair.split()
    ]
    assert [(r.group, r.seed) for r in rows if r.study == "adaptation"] == [(g, s) for g in "045" for s in (0, 1)]
    left = jobs(["wear"], [], 0, rows)
    assert all(job[0] == "leave one out" for found in left for job in found)
