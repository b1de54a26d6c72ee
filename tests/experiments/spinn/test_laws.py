"""Residuals against closed forms in float64, and constants that are found again."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from resu.experiments.spinn.fields import FIELDS, Field, burgers_residual, derivative
from resu.experiments.spinn.laws import Archard, LumpedHeat, Pairs, law_for, take_pairs


def archard(k=0.5):
    law = Archard(k=k, size=2.0, rate=3.0, weight=0.5, unit="µm", time_unit="s", drive="N")
    return law.double()


def pairs_of(first, last, time, drive):
    return Pairs(*(torch.tensor(x, dtype=torch.float64) for x in (first, last, time, drive)))


def test_archard_is_zero_for_wear_that_grows_with_work():
    k, time, load = 0.5, np.array([[2.0], [5.0]]), np.array([[3.0], [0.7]])
    law = archard(k)
    terms = law.terms(pairs_of([[1.0], [4.0]], [[1.0], [4.0]] + k * load * time, time, load))
    assert all(term.rms < 1e-7 for term in terms.values())  # k went through float32
    assert [term.unit for term in terms.values()] == ["µm", "µm/s", "µm/s"]
    assert law.constants() == {"k": "0.5 µm/s per (N)"}


def test_each_term_of_wear_by_hand():
    terms = archard().terms(pairs_of([[-1.0], [4.0]], [[1.0], [2.0]], [[2.0], [4.0]], [[2.0], [0.0]]))
    # below zero: -1 of four ends; rates 1 and -0.5; Archard: 1 - 0.5*2 = 0 and -0.5 - 0 = -0.5
    assert terms["wear is not negative"].rms == pytest.approx(math.sqrt(1 / 4))
    assert terms["wear does not fall"].rms == pytest.approx(math.sqrt(0.25 / 2))
    assert terms["Archard's law"].rms == pytest.approx(math.sqrt(0.25 / 2), rel=1e-6)
    assert terms["Archard's law"].loss.item() == pytest.approx(0.5 * 0.125 / 9, rel=1e-6)
    assert terms["wear is not negative"].loss.item() == pytest.approx(0.25 / 4)
    with pytest.raises(ValueError, match="positive"):
        archard(0.0)


def test_heat_residual_is_second_order_small_for_the_exact_solution():
    """d = o + g q (1 − exp(−t/τ)) solves τ d' + d = o + g q."""
    tau, gain, offset, q = 600.0, 2.0, -1.0, 3.0
    law = LumpedHeat(
        tau=torch.tensor([tau], dtype=torch.float64),
        gain=torch.tensor([[gain]], dtype=torch.float64),
        offset=torch.tensor([offset], dtype=torch.float64),
        size=torch.tensor([7.0], dtype=torch.float64),
        usual=torch.tensor([[2.0], [0.3]], dtype=torch.float64),
        weight=1.0,
        unit="µm",
        drives=("spindle speed, 1000 rpm",),
    )

    def d(t):
        return offset + gain * q * (1 - np.exp(-t / tau))

    found = []
    for dt in (60.0, 30.0):
        t = np.arange(0, 3000, dt)[:, None]
        pairs = pairs_of(d(t), d(t + dt), np.full_like(t, dt), np.full_like(t, q))
        found.append(float(law.residual(pairs).detach().abs().max()))
    assert found[0] < 6 * (60 / tau) ** 2 / 12 * 1.1
    assert found[0] / found[1] == pytest.approx(4, rel=0.1)
    assert law.constants() == {"τ": "600 s", "gain of spindle speed": "2 µm/(1000 rpm)"}


def test_constants_start_where_least_squares_puts_them(data):
    law = law_for(data, weight=0.3)
    assert isinstance(law, Archard)
    assert float(law.log_k.detach().exp()) == pytest.approx(0.05, rel=1e-4)
    assert law.weight == 0.3
    ends = data.pairs(data.test)
    exact = take_pairs(data, ends, data.targets[ends[:, 0]], data.targets[ends[:, 1]])
    assert law.terms(exact)["Archard's law"].rms < 1e-4 * law.rate + 1e-4


def test_input_recordings_that_no_law_fits_are_refused(recording):
    def law(**changed):
        return law_for(dataclasses.replace(recording, **changed).prepare())

    with pytest.raises(ValueError, match="which law holds for 'lathe'"):
        law(name="lathe")
    with pytest.raises(ValueError, match=r"0 pairs of training rows lie 40 rows apart \(lag\)"):
        law(lag=40)
    with pytest.raises(ValueError, match="one drive, load × speed; the recording has 2"):
        law(drive=np.c_[recording.drive, recording.drive], drives=("one, N", "two, N"))


def test_a_series_of_one_row_says_nothing_of_heat(recording):
    heat = dataclasses.replace(recording, name="thermal", parts=((0, 1), (2,), (3,)))
    sequence, group = heat.sequence.copy(), heat.group.copy()
    sequence[-1] = group[-1] = 9
    short = dataclasses.replace(heat, sequence=sequence, group=group, parts=((0, 1, 9), (2,), (3,)))
    found, wanted = (law_for(one.prepare()) for one in (short, heat))
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), wanted.parameters(), strict=True))


def test_derivatives_are_those_of_the_book():
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None].requires_grad_()
    first = derivative(torch.sin(3 * x), x)
    assert torch.allclose(first, 3 * torch.cos(3 * x), atol=1e-12)
    assert torch.allclose(derivative(first, x), -9 * torch.sin(3 * x), atol=1e-12)


def test_burgers_residual_of_a_travelling_wave_is_zero():
    """u = c − a tanh(a (x − c t) / (2 ν)) solves u_t + u u_x = ν u_xx."""
    nu, a, c = 0.1, 0.7, 0.4
    t = torch.rand(64, 1, dtype=torch.float64).requires_grad_()
    x = (2 * torch.rand(64, 1, dtype=torch.float64) - 1).requires_grad_()
    u = c - a * torch.tanh(a * (x - c * t) / (2 * nu))
    assert burgers_residual(u, t, x, nu).abs().max() < 1e-12


def test_allen_cahn_residual_of_a_standing_wall_is_zero():
    """u = tanh(x √(5 / 2D)) stands still: D u_xx = 5 u³ − 5 u."""
    equation = FIELDS["allen-cahn"]
    t = torch.rand(32, 1, dtype=torch.float64).requires_grad_()
    x = (2 * torch.rand(32, 1, dtype=torch.float64) - 1).requires_grad_()
    u = torch.tanh(x * math.sqrt(5 / (2 * 1e-4)))
    assert equation.residual(u + 0 * t, t, x).abs().max() < 1e-9


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_a_field_starts_right_and_keeps_its_edges(name):
    equation = FIELDS[name]
    field = Field(equation, (8, 8))
    x = torch.linspace(-1, 1, 11, dtype=torch.float64)[:, None]
    assert torch.equal(field(torch.zeros_like(x), x), equation.initial(x))
    t = torch.rand(5, 1, dtype=torch.float64)
    left, right = field(t, -torch.ones_like(t)), field(t, torch.ones_like(t))
    assert torch.allclose(left, right, atol=1e-12)  # 0 for Burgers, periodic for Allen–Cahn
