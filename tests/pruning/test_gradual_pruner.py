import io

import pytest
import torch
from torch import nn

from resu.pruning.holding import hold_masks
from resu.pruning.pruners import GradualPruner, MagnitudePruner
from tests.reference import cubic


def _model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))


def _step(model, optimizer, generator):
    optimizer.zero_grad()
    model(torch.randn(16, 12, generator=generator)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize(("begin", "n", "delta", "s_i", "s_f"), [(0, 10, 3, 0.0, 0.9), (4, 7, 2, 0.25, 0.8)])
def test_masks_follow_the_paper_position_by_position(begin, n, delta, s_i, s_f):
    model, generator = _model(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    gradual = GradualPruner(MagnitudePruner(s_f), s_i, s_f, begin, begin + n * delta, delta)
    alive = {"0.weight": [True] * 192, "2.weight": [True] * 64}
    for step in range(begin + n * delta + 4):
        _step(model, optimizer, generator)
        if begin <= step <= begin + n * delta and (step - begin) % delta == 0:
            # Rounded as the schedule says it is: to twelve decimals.
            wanted = round(cubic.sparsity(step, s_i, s_f, begin, n, delta), 12)
            for name in alive:
                weights = model.get_parameter(name).view(-1).tolist()
                alive[name] = cubic.kept(weights, wanted, alive[name])
        gradual.step(model, step)
        for name, mask in gradual.masks.items():
            assert mask.mask.view(-1).tolist() == alive[name], (name, step)
            assert (model.get_parameter(name).view(-1)[~torch.tensor(alive[name])] == 0).all()
    assert gradual.finished


@pytest.mark.parametrize("frequency", [1, 3, 7, 100, 1000])
def test_trap_19_the_end_is_exact_whatever_the_frequency(frequency):
    model = nn.Linear(100, 10)
    gradual = GradualPruner(final_sparsity=0.9, begin_step=0, end_step=100, frequency=frequency)
    for step in range(101):
        gradual.step(model, step)
    assert int((model.weight == 0).sum()) == 900
    assert gradual.sparsity == 0.9
    assert gradual.history[-1]["sparsity"] == 0.9


def test_steps_left_out_are_made_up_for():
    model = nn.Linear(100, 10)
    gradual = GradualPruner(final_sparsity=0.9, begin_step=10, end_step=100, frequency=10)
    assert not gradual.step(model, 5)
    assert gradual.masks == {}
    assert gradual.step(model, 37)  # the last due step was 30
    assert gradual.history[-1]["sparsity"] == pytest.approx(0.9 * (1 - (1 - 20 / 90) ** 3))
    assert not gradual.step(model, 39)
    assert not gradual.step(model, 39)
    assert gradual.step(model, 5000)
    assert gradual.sparsity == 0.9
    assert [entry["step"] for entry in gradual.history] == [37, 5000]


def test_step_counts_by_itself_and_remembers_the_model():
    model = nn.Linear(10, 10)
    gradual = GradualPruner(MagnitudePruner(0.5), end_step=4, frequency=2)
    changed = [gradual.step(model), *(gradual.step() for _ in range(5))]
    assert changed == [False, False, True, False, True, False]
    assert gradual.sparsity == 0.5


def test_trap_28_masks_hold_after_the_end_until_released():
    model, generator = _model(), torch.Generator().manual_seed(0)
    gradual = GradualPruner(final_sparsity=0.75, end_step=3, frequency=1)
    for step in range(4):
        gradual.step(model, step)
    after = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)  # the next fine-tuning run
    for _ in range(5):
        _step(model, after, generator)
    assert int((model[0].weight == 0).sum()) == 144
    gradual.release()
    _step(model, after, generator)
    assert int((model[0].weight == 0).sum()) < 144


@pytest.mark.parametrize("cut", [1, 6, 11, 30])
@pytest.mark.parametrize("importance", ["magnitude", "random"])
def test_trap_27_resume_is_bit_exact(cut, importance):
    def make():
        model = _model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        inner = MagnitudePruner(0.9, scope="global", importance=importance)
        return model, optimizer, GradualPruner(inner, 0.1, 0.9, 2, 20, 4, model=model)

    def run(parts, generator, steps):
        model, optimizer, gradual = parts
        for step in steps:
            _step(model, optimizer, generator)
            gradual.step(model, step)

    generator = torch.Generator().manual_seed(0)
    whole = make()
    run(whole, generator, range(35))
    generator.manual_seed(0)
    first = make()
    run(first, generator, range(cut))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    first[2].release()
    file.seek(0)
    second = make()
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    run(second, generator, range(cut, 35))
    for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)
    for p, q in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        for key, value in whole[1].state[p].items():
            assert torch.equal(value, second[1].state[q][key]), key
    assert whole[2].history == second[2].history
    assert whole[2].masks == second[2].masks


def test_a_state_needs_its_model_and_its_settings():
    model = nn.Linear(10, 10)
    gradual = GradualPruner(final_sparsity=0.5, end_step=4, frequency=2)
    for step in range(5):
        gradual.step(model, step)
    state = gradual.state_dict()
    gradual.release()
    fresh = GradualPruner(final_sparsity=0.5, end_step=4, frequency=2)
    with pytest.raises(ValueError, match="pass model="):
        fresh.load_state_dict(state)
    fresh.load_state_dict(state, model)
    assert fresh.sparsity == 0.5
    fresh.release()
    other = GradualPruner(final_sparsity=0.6, end_step=4, frequency=2)
    with pytest.raises(ValueError, match=r"another ramp: final_sparsity=0\.5 \(here 0\.6\)"):
        other.load_state_dict(state, model)


def test_trap_15_optimizer_state_of_what_dies_is_zero():
    model, generator = _model(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    gradual = GradualPruner(final_sparsity=0.8, end_step=6, frequency=2, optimizer=optimizer)
    for step in range(7):
        _step(model, optimizer, generator)
        gradual.step(model, step)
        for name, mask in gradual.masks.items():
            state = optimizer.state[model.get_parameter(name)]
            assert (state["exp_avg"][~mask.mask] == 0).all()
            assert (state["exp_avg_sq"][~mask.mask] == 0).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "final_sparsity, or a pruner"),
        ({"pruner": MagnitudePruner({"0": 0.5})}, "one final_sparsity"),
        ({"final_sparsity": 0.5, "initial_sparsity": 0.6}, "cannot fall"),
        ({"final_sparsity": 1.2}, r"final_sparsity must lie in \[0, 1\)"),
        ({"final_sparsity": 0.5, "begin_step": 5, "end_step": 4}, "begin_step <= end_step"),
        ({"final_sparsity": 0.5, "frequency": 0}, "at least 1"),
        ({"pruner": MagnitudePruner(0.5, pattern="2:4")}, "no ramp to it"),
    ],
)
def test_impossible_ramps(options, said):
    with pytest.raises(ValueError, match=said):
        GradualPruner(**options)


def test_mistakes_in_the_loop_are_found():
    with pytest.raises(TypeError, match=r"expected a pruner, .* got 0\.9"):
        GradualPruner(0.9)
    with pytest.raises(TypeError, match="must be an integer, got '3'"):
        GradualPruner(MagnitudePruner(0.5)).step(nn.Linear(4, 4), "3")
    model = nn.Linear(10, 10)
    gradual = GradualPruner(final_sparsity=0.5, end_step=10, frequency=1)
    with pytest.raises(ValueError, match="which model"):
        gradual.step()
    gradual.step(model, 7)
    with pytest.raises(ValueError, match="not per epoch"):
        gradual.step(model, 0)
    with pytest.raises(ValueError, match="another model"):
        gradual.step(nn.Linear(10, 10), 8)
    with pytest.raises(ValueError, match="held by a mask already"):
        hold_masks(model, gradual.masks)
    gradual.release()


def test_stats_before_and_after():
    gradual = GradualPruner(final_sparsity=0.5, end_step=0)
    with pytest.raises(ValueError, match="no step was due"):
        _ = gradual.stats
    gradual.step(nn.Linear(10, 10), 0)
    assert gradual.stats.kept == 50
