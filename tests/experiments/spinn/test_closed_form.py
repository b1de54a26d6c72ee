"""The output layer in closed form: stationary in the whole loss, law included; zeros stay."""

import dataclasses

import numpy as np
import pytest
import torch

from resu.experiments.spinn.closed_form import output_layer, output_solutions, solve_output
from resu.experiments.spinn.fitting import Recipe, fit
from resu.experiments.spinn.laws import START_TAU, LumpedHeat, law_for, take_pairs
from resu.experiments.spinn.recording import Recording
from resu.experiments.spinn.signals import integral, lagged
from resu.experiments.spinn.twin import Twin, dense_network, score


def warm(rows=240, seed=0):
    """One body with two channels, heated by a speed and by a room: the law holds exactly."""
    make = np.random.default_rng(seed)
    time = 60.0 * np.arange(rows)
    speed = np.repeat(make.random(rows // 12), 12)[:, None]
    room = 20 + np.cumsum(0.1 * make.standard_normal((rows, 1)), 0)
    level = lagged(np.c_[speed, room], START_TAU, 60.0)
    targets = level @ np.array([[3.0, -2.0], [0.5, 1.0]]) + 4
    return Recording(
        name="thermal",
        inputs=np.c_[speed, room, level, make.standard_normal((rows, 2))],
        features=("speed", "room", "speed, late", "room, late", "noise", "noise"),
        targets=targets,
        channels=("x", "y"),
        unit="µm",
        time=time,
        time_unit="s",
        drive=integral(np.c_[speed, room], time),
        drives=("speed, 1000 rpm", "room, °C"),
        sequence=np.zeros(rows, dtype=np.int64),
        group=np.searchsorted([rows * 6 // 10, rows * 7 // 10], np.arange(rows), side="right").astype(np.int64),
        group_name="block of time",
        lag=1,
        parts=((0,), (1,), (2,)),
    )


def twin_of(data, weight):
    torch.manual_seed(0)
    network = dense_network(data.inputs.shape[1], data.targets.shape[1], (24, 12))
    return Twin(network, data.targets[data.train], None if weight is None else law_for(data, weight))


@pytest.mark.parametrize("weight", [None, 0.3, 20.0])
def test_it_is_stationary_in_the_loss(weight):
    data = warm().prepare()
    twin = twin_of(data, weight)
    with torch.no_grad():
        output_layer(twin).weight[0, :4] = 0
    zeros = output_layer(twin).weight == 0
    solved = solve_output(twin, data, data.train)
    twin.double()
    for name in ("inputs", "targets"):
        object.__setattr__(data, name, getattr(data, name).double())
    last = output_layer(twin)
    error = (twin(data.inputs[data.train]) - data.targets[data.train]) / twin.scale
    loss = error.square().mean() + solved.pull * last.weight.square().sum()
    if twin.law is not None:
        ends = data.pairs(data.train)
        pairs = take_pairs(data, ends, twin(data.inputs[ends[:, 0]]), twin(data.inputs[ends[:, 1]]))
        loss = loss + weight * (twin.law.residual(pairs) / twin.law.size).square().mean()
    gradient = torch.autograd.grad(loss, [last.weight, last.bias])
    small = 2e-5 * max(1.0, weight or 0.0)  # the solution went through float32
    assert gradient[0][~zeros].abs().max() < small
    assert gradient[1].abs().max() < small
    assert torch.equal(last.weight == 0, zeros)


def test_a_penalty_that_is_given_is_taken():
    data = warm().prepare()
    twin = twin_of(data, None)
    assert solve_output(twin, data, data.train, 10.0).penalty == 10.0
    small = output_layer(twin).weight.norm()
    assert solve_output(twin, data, data.train, 1000.0).pull > 0
    assert output_layer(twin).weight.norm() < small


def test_the_penalty_never_depends_on_the_test_part():
    data = warm().prepare()
    spoiled = dataclasses.replace(data, targets=data.targets.clone())
    spoiled.targets[data.test] = 1e6
    one, other = twin_of(data, 0.3), twin_of(spoiled, 0.3)
    assert solve_output(one, data, data.train) == solve_output(other, spoiled, data.train)
    assert torch.equal(output_layer(one).weight, output_layer(other).weight)


def test_constants_of_heat_start_at_those_of_a_body_that_obeys():
    data = warm(rows=2400).prepare()
    law = law_for(data, 1.0)
    assert isinstance(law, LumpedHeat)
    assert law.log_tau.exp().tolist() == pytest.approx([START_TAU, START_TAU])
    ends = data.pairs(data.train)
    exact = take_pairs(data, ends, data.targets[ends[:, 0]], data.targets[ends[:, 1]])
    assert law.terms(exact)["lumped heat"].rms < 0.25 * float(data.targets[data.train].std(0).mean())
    names = law.constants()
    assert list(names) == ["τ", "gain of speed", "gain of room"]
    assert names["gain of speed"].endswith(" µm/(1000 rpm)")


def test_a_law_that_holds_helps_where_there_is_little_data():
    """A tenth of the rows is fitted; the constants of the law come from all of them."""
    data = warm(rows=2400).prepare()
    few = data.train[:144]
    with_law, without = twin_of(data, 20.0), twin_of(data, None)
    recipe = Recipe(steps=0, penalty=1.0)
    fit(without, data, recipe, rows=few)
    fit(with_law, data, recipe, rows=few)
    test = data.test
    found = [score(t.predict(data.inputs[test]), data.targets[test]) for t in (with_law, without)]
    assert found[0] > found[1]


def test_rows_that_count_often_begin_pairs_that_count_often(monkeypatch):
    """Each pair is there once, with its number: a hundred copies of a series are gigabytes."""
    data, seen = warm().prepare(), []
    twin = twin_of(data, 0.3)
    rows = torch.cat([data.train, data.test[:20].repeat(100)]).sort().values

    def counted(data, ends, first, last):
        seen.append(ends)
        return take_pairs(data, ends, first, last)

    monkeypatch.setattr("resu.experiments.spinn.closed_form.take_pairs", counted)
    ((weight, bias),), unit = output_solutions(twin, data, rows, [10.0])
    assert len(seen[0]) == len(seen[0].unique(dim=0)) == len(data.train) + 20 - 2
    weight.requires_grad_()
    bias.requires_grad_()
    hidden = twin.network[:-1](data.inputs).detach().double()
    found = hidden @ weight.T + bias
    error = found[rows] - ((data.targets - twin.mean) / twin.scale)[rows]
    ends = data.pairs(rows)
    assert len(ends) == len(data.train) - 1 + 19 * 100
    pairs = take_pairs(data, ends, *(twin.mean + twin.scale * found[end] for end in ends.T))
    law = twin.law.double().residual(pairs) / twin.scale
    loss = error.square().sum() + 10 * unit * weight.square().sum() + 0.3 * len(rows) * law.square().sum(1).mean()
    for gradient in torch.autograd.grad(loss, [weight, bias]):
        assert gradient.abs().max() < 1e-6 * len(rows)


def test_without_a_pair_the_law_says_nothing():
    data = warm().prepare()
    twin, rows = twin_of(data, 20.0), data.train[::2]
    assert not len(data.pairs(rows))
    solved, _ = output_solutions(twin, data, rows, [10.0])
    twin.law = None
    without, _ = output_solutions(twin, data, rows, [10.0])
    assert torch.equal(solved[0][0], without[0][0])


def test_hidden_units_that_do_not_vary_leave_the_mean():
    data = warm().prepare()
    twin = twin_of(data, None)
    with torch.no_grad():
        twin.network[-3].weight.zero_()
    solve_output(twin, data, data.train, 1.0)
    assert torch.allclose(twin.predict(data.inputs), data.targets[data.train].mean(0), atol=1e-4)
