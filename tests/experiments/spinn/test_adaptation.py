"""A new tool: what changes, what stays, how shares are told, and what it costs."""

import copy
import dataclasses
from functools import partial

import numpy as np
import pytest
import torch

from resu.experiments.spinn import new_tools, runs
from resu.experiments.spinn.adaptation import (
    CANDIDATES,
    PENALTIES,
    WEIGHT,
    adapt,
    adapting_cost,
    compare_adaptation,
    error_products,
    first_part,
    learn_shares,
    retrain,
    training_cost,
)
from resu.experiments.spinn.closed_form import solving_cost
from resu.experiments.spinn.jobs import Job, jobs, one
from resu.experiments.spinn.laws import law_for
from resu.experiments.spinn.mixing import mixture
from resu.experiments.spinn.new_tools import products_without
from resu.experiments.spinn.results import KnownToolRow, Results
from resu.experiments.spinn.ridge import ridge_weights
from resu.experiments.spinn.runs import dense_twin
from resu.experiments.spinn.twin import Twin
from tests.experiments.spinn.conftest import made_up
from tests.experiments.spinn.test_closed_form import warm
from tests.experiments.spinn.test_sparse import HIDDEN, RECIPE, twin_of


def only(candidate):
    return torch.nn.functional.one_hot(torch.tensor(candidate), CANDIDATES).double()


def sparse_output(twin):
    with torch.no_grad():
        twin.network[4].weight[0, :5] = 0
    return twin


def test_it_changes_the_output_layer_alone(data):
    twin = sparse_output(twin_of(data))
    before = copy.deepcopy(twin.state_dict())
    adapted = adapt(twin, data, first_part(data, 5)[0])
    assert all(torch.equal(before[name], value) for name, value in twin.state_dict().items())
    changed = {name for name, value in adapted.state_dict().items() if not torch.equal(before[name], value)}
    assert changed == {"network.4.weight", "network.4.bias"}
    assert torch.equal(adapted.network[4].weight == 0, twin.network[4].weight == 0)


def test_the_first_candidate_is_the_layer_as_it_is(data):
    twin = sparse_output(twin_of(data))
    adapted = adapt(twin, data, first_part(data, 5)[0], only(0))
    assert all(torch.equal(a, b) for a, b in zip(adapted.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("k", range(len(PENALTIES)))
def test_the_others_are_weighted_ridge(data, k):
    """Rows that count a hundred times are rows whose square root of a hundred times error is squared."""
    twin = twin_of(data)
    rows = first_part(data, 5)[0]
    adapted = adapt(twin, data, rows, only(k + 1))
    every = torch.cat([data.train, rows.repeat(WEIGHT)])
    hidden = twin.network[:-1](data.inputs).detach().double()
    wanted = ((data.targets - twin.mean) / twin.scale).double()
    w, b = ridge_weights(hidden[every], wanted[every], PENALTIES[k] * float(hidden[every].var(0).mean()))
    assert torch.allclose(adapted.network[4].weight.double().T, w, rtol=1e-4, atol=1e-5)
    assert torch.allclose(adapted.network[4].bias.double(), b, rtol=1e-4, atol=1e-5)


def test_predictions_are_mixed_as_the_layers_are(data):
    twin = sparse_output(twin_of(data))
    rows = first_part(data, 5)[0]
    shares = torch.tensor([0.1, 0.0, 0.3, 0.0, 0.2, 0.0, 0.4])
    each = torch.stack([adapt(twin, data, rows, only(k)).predict(data.inputs).double() for k in range(CANDIDATES)])
    mixed = adapt(twin, data, rows, shares.tolist()).predict(data.inputs).double()
    assert torch.allclose(mixed, torch.tensordot(shares.double(), each, 1), rtol=1e-5, atol=1e-5)
    alike = adapt(twin, data, rows).predict(data.inputs).double()
    assert torch.allclose(alike, each.mean(0), rtol=1e-5, atol=1e-5)


def test_a_twin_that_was_trained_on_other_rows_keeps_its_scale(data):
    twin, rows = twin_of(data), first_part(data, 5)[0]
    other = copy.deepcopy(twin)
    with torch.no_grad():
        other.scale *= 3
        other.mean += 10
        other.network[4].weight /= 3
        other.network[4].bias.copy_((twin.network[4].bias * twin.scale - 10) / other.scale)
    assert torch.allclose(other.predict(data.inputs), twin.predict(data.inputs), rtol=1e-4, atol=1e-4)
    adapted = [adapt(one, data, rows).predict(data.inputs) for one in (twin, other)]
    assert torch.allclose(adapted[0], adapted[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("used", [0, 1])
def test_an_output_layer_that_uses_few_units_or_none(data, used):
    twin, rows = twin_of(data), first_part(data, 5)[0]
    with torch.no_grad():
        twin.network[4].weight[0, used:] = 0
    adapted = adapt(twin, data, rows)
    assert int((adapted.network[4].weight != 0).sum()) == used
    assert adapted.network[4].bias.isfinite().all()
    assert adapted.network[4].bias != twin.network[4].bias
    assert error_products(twin, data, 5).isfinite().all()


def test_adapting_leaves_random_numbers_as_they_were(data):
    twin, rows = twin_of(data), first_part(data, 5)[0]
    before = torch.get_rng_state()
    adapt(twin, data, rows)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shares", [[1.0], [0.5] * CANDIDATES, torch.ones(CANDIDATES, 1), [float("nan")] * CANDIDATES])
def test_input_shares_that_are_none_are_refused(data, shares):
    with pytest.raises(ValueError, match="shares must be 7 numbers that sum to 1"):
        adapt(twin_of(data), data, first_part(data, 5)[0], shares)


def test_products_of_errors_are_those_of_adapting(data):
    twin = sparse_output(twin_of(data))
    rows, rest = first_part(data, 5)
    missed = torch.stack(
        [
            ((adapt(twin, data, rows, only(k)).predict(data.inputs[rest]) - data.targets[rest]) / twin.scale).flatten()
            for k in range(CANDIDATES)
        ]
    ).double()
    assert torch.allclose(error_products(twin, data, 5), missed @ missed.T, rtol=1e-3, atol=1e-6)


def test_nothing_of_the_rest_of_a_life_is_learned_from(data):
    twin = twin_of(data)
    rows, rest = first_part(data, 5)
    assert len(rows) + len(rest) == 40
    assert data.time[rows].max() < data.time[rest].min()
    spoiled = copy.deepcopy(data)
    spoiled.targets[rest] = 1e6
    before, after = (adapt(twin, d, rows) for d in (data, spoiled))
    assert torch.equal(before.network[4].weight, after.network[4].weight)
    still = dataclasses.replace(RECIPE, steps=5)
    before, after = (retrain(twin, d, rows, still, 0, 10) for d in (data, spoiled))
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_shares_are_learned_from_the_known_tools_alone(recording):
    made, told = [], []

    def make(split):
        made.append(split)
        return twin_of(split, steps=5)

    shares = learn_shares(recording, make, progress=lambda *what: told.append(what))
    assert told == [*((k, 5, f"without tool {k}") for k in range(5)), (5, 5, "shares")]
    for left_out, split in enumerate(made):
        seen = set(recording.group[split.train.numpy()]) | set(recording.group[split.val.numpy()])
        assert seen == {0, 1, 2, 3, 4} - {left_out}  # nor tool 5, which is the test part
    wanted = mixture([error_products(twin_of(s, steps=5), s, k) for k, s in enumerate(made)])
    assert torch.equal(shares, wanted)
    assert float(shares.sum()) == pytest.approx(1)
    with pytest.raises(ValueError, match="at least one tool"):
        learn_shares(recording, make, [])


def test_comparison_counts_what_it_says(data):
    twin = twin_of(data)
    rows, rest = first_part(data, 5)
    result = compare_adaptation(twin, data, 5, [None, only(0)], RECIPE, weight=3)
    assert result.rest == len(rest)
    assert result.adapted[1] == result.before
    missed = adapt(twin, data, rows).predict(data.inputs[rest]) - data.targets[rest]
    assert result.adapted[0] == pytest.approx(float(missed.square().mean().sqrt()))
    full = training_cost(twin.network, 32, 60) + solving_cost(twin, 160 + len(rows))
    assert result.cost == adapting_cost(twin, 160, len(rows)) / full


def test_retraining_counts_new_rows_as_is_best_for_it(data):
    twin, (rows, rest) = twin_of(data), first_part(data, 5)
    anew = retrain(twin, data, rows, RECIPE, 0, 10).predict(data.inputs[rest]) - data.targets[rest]
    assert compare_adaptation(twin, data, 5, [None], RECIPE).retrained == float(anew.square().mean().sqrt())


def test_input_groups_without_a_first_part_or_a_rest_are_refused(recording, data):
    with pytest.raises(ValueError, match=r"there is no tool 9; there are \[0, 1, 2, 3, 4, 5\]"):
        first_part(data, 9)
    alive = np.delete(np.arange(240), np.arange(201, 240))  # of tool 5 one row
    rows = ("inputs", "targets", "time", "drive", "sequence", "group")
    short = dataclasses.replace(recording, **{name: getattr(recording, name)[alive] for name in rows}).prepare()
    with pytest.raises(ValueError, match="tool 5 has 1 rows to learn from and 0 to be judged by"):
        compare_adaptation(twin_of(short), short, 5, [None], RECIPE)


def test_costs_by_hand():
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    assert training_cost(network, 10, 7) == 3 * 8 * 10 * 7
    twin = Twin(network, torch.arange(3.0)[:, None])
    assert solving_cost(twin, 10) == 8 * 10 + 10 * 4 + 7 * (8 // 3)


def test_a_law_of_heat_has_a_matrix_per_channel():
    data = warm().prepare()
    network = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.Linear(3, 2))
    twin = Twin(network, data.targets[data.train], law_for(data))
    assert solving_cost(twin, 10) == 24 * 10 + 10 * 9 * (1 + 2) + 7 * 2 * (27 // 3)
    assert adapting_cost(twin, 10, 5) == 24 * 15 + 15 * 9 * (1 + 2) + 6 * 2 * 27 // 3


def test_cost_of_adapting_by_hand(data):
    twin = twin_of(data)
    with torch.no_grad():
        twin.network[4].weight[0, :6] = 0
    weights = 4 * 24 + 24 * 16 + 16
    assert adapting_cost(twin, 160, 12) == weights * 172 + 172 * 10**2 + 6 * 10**3 // 3


def test_products_for_a_tool_are_those_of_twins_that_do_not_know_it(monkeypatch):
    monkeypatch.setitem(new_tools.LIVES, "wear", (3, 4, 5))
    rows = [
        KnownToolRow("wear", group, other, (float(10 * group + other),) * CANDIDATES**2, 1.0)
        for group in (5, 4, 3)
        for other in (3, 4, 5)
        if group != other
    ]
    assert [float(g[0, 0]) for g in products_without(rows, "wear", 4)] == [34.0, 54.0]
    with pytest.raises(ValueError, match="milling without 3 and 1 has not been run"):
        products_without(rows, "milling", 3)
    with pytest.raises(ValueError, match="wear without 3 and 5 has not been run"):
        products_without(rows[2:], "wear", 3)


def test_every_tool_in_turn_is_new(tmp_path, monkeypatch):
    monkeypatch.setattr(new_tools, "load_recording", lambda name, folder: made_up())
    monkeypatch.setitem(new_tools.LIVES, "wear", (0, 4, 5))
    monkeypatch.setattr(new_tools, "dense_twin", partial(dense_twin, hidden=HIDDEN))
    monkeypatch.setattr("resu.experiments.spinn.jobs.SEEDS", 2)
    monkeypatch.setattr(new_tools, "SEEDS", 2)
    monkeypatch.setitem(runs.RECIPES, "wear", dataclasses.replace(RECIPE, steps=3, tune=1))
    results = tmp_path / "results"
    first, second = jobs(["wear"], [], 0, Results())
    known = [job for job in first if job.study == "known_tools"]
    assert known == [Job("known_tools", "wear", 0), Job("known_tools", "wear", 4)]
    assert second == [Job("new_tools", "wear", g) for g in (0, 4, 5)]
    for job in (*known, *second):
        one((tmp_path, results), job)
    found = Results.read(results)
    assert sorted((row.group, row.other) for row in found.known_tools) == [
        (0, 4),
        (0, 5),
        (4, 0),
        (4, 5),
        (5, 0),
        (5, 4),
    ]
    assert [(row.group, row.seed) for row in found.new_tools] == [(g, s) for g in (0, 4, 5) for s in (0, 1)]
    for row in found.new_tools:
        assert sum(row.shares) == pytest.approx(1, abs=1e-3)
        assert torch.allclose(
            mixture(products_without(found.known_tools, "wear", row.group)),
            torch.tensor(row.shares).double(),
            atol=1e-4,
        )
    left = jobs(["wear"], [], 0, found)
    assert all(job.study == "left_out" for studies in left for job in studies)
    found.known_tools.pop()
    assert [job for job in jobs(["wear"], [], 0, found)[0] if job.study == "known_tools"] == [
        Job("known_tools", "wear", 4)
    ]
