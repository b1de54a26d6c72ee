"""Stages to exactly 70 %, masks that hold, a stage taken back, a killed run that goes on, neurons, resurrection."""

import copy
import os
import signal
import subprocess
import sys

import pytest
import torch

from resu.core.io import FileFormatError
from resu.experiments.spinn.fitting import Recipe, fit, physics_rms
from resu.experiments.spinn.laws import law_for
from resu.experiments.spinn.neurons import remove_neurons, widths
from resu.experiments.spinn.ridge import ridge, ridge_penalty, ridge_weights
from resu.experiments.spinn.sparse import kept, prune_in_stages, resurrect, validated
from resu.experiments.spinn.twin import Twin, dense_network, score

RECIPE = Recipe(steps=60, tune=8, rate=5e-3, tune_rate=2e-3, rows=32, pairs=8)
HIDDEN = (24, 16)


def twin_of(data, seed=0, steps=60):
    torch.manual_seed(seed)
    twin = Twin(dense_network(data.inputs.shape[1], 1, HIDDEN), data.targets[data.train], law_for(data))
    return fit(twin, data, RECIPE, steps=steps)


def weights(twin):
    return [m.weight for m in twin.network if isinstance(m, torch.nn.Linear)]


def test_the_network_has_the_documented_size():
    assert sum(p.numel() for p in dense_network(24, 1).parameters()) == 669_697
    assert dense_network(24, 1)[0].bias.abs().max() == 0


def test_a_channel_that_does_not_vary_is_refused(data):
    with pytest.raises(ValueError, match=r"channels \[1\] of the targets are the same in all 9 rows"):
        Twin(dense_network(4, 2, HIDDEN), torch.stack([torch.arange(9.0), torch.ones(9)], 1))


def test_training_learns_wear_and_the_wear_constant(data):
    twin = twin_of(data, steps=300)
    found = twin.predict(data.inputs)
    assert score(found[data.test], data.targets[data.test]) > 0.95
    assert float(twin.law.log_k.detach().exp()) == pytest.approx(0.05, rel=0.2)
    terms = physics_rms(twin, data, data.test)
    assert {unit for _, unit in terms.values()} == {"µm", "µm/s"}
    assert terms["wear does not fall"][0] < 0.05


def test_training_repeats_bit_for_bit(data):
    a, b = twin_of(data), twin_of(data)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_ridge_solves_its_normal_equations():
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    w, b = ridge_weights(x, y, 2.0)
    w.requires_grad_()
    b.requires_grad_()
    loss = (x @ w + b - y).square().sum() + 2.0 * w.square().sum()
    for gradient in torch.autograd.grad(loss, (w, b)):
        assert gradient.abs().max() < 1e-10


def test_ridge_never_looks_at_the_test_part(data):
    spoiled = copy.deepcopy(data)
    spoiled.targets[data.test] = 1e6
    assert ridge_penalty(data) == ridge_penalty(spoiled)
    assert torch.equal(ridge(data, 3.0), ridge(spoiled, 3.0))


def test_four_stages_reach_exactly_seventy_percent(data):
    twin = twin_of(data)
    result = prune_in_stages(twin, data, RECIPE)
    assert len(result.stages) == 4
    assert result.stages[-1].sparsity == 0.7
    for name, weight in zip((f"network.{i}.weight" for i in (0, 2, 4)), weights(twin), strict=True):
        assert int((weight == 0).sum()) == int(weight.numel() * 0.7 + 1e-9)
        assert (weight[~result.masks[name]] == 0).all()
        assert name in result.stages[-1].layers
    assert not any(name.startswith("law") for name in result.masks)
    fit(twin, data, RECIPE, steps=3)  # still held
    assert all((w[~result.masks[n]] == 0).all() for n, w in twin.named_parameters() if n in result.masks)
    result.release()


def test_stages_that_miss_are_refused_with_the_figure(data):
    twin = twin_of(data, steps=1)
    before = copy.deepcopy(twin.state_dict())
    with pytest.raises(ValueError, match=r"0\.2, 0\.2, 0\.15, 0\.15 of what is still active reaches only 53\.8 %"):
        prune_in_stages(twin, data, RECIPE, plan=[0.2, 0.2, 0.15, 0.15])
    assert all(torch.equal(before[name], value) for name, value in twin.state_dict().items())


def test_a_stage_that_costs_too_much_is_taken_back(data):
    twin = twin_of(data)
    before = validated(data)(twin)
    result = prune_in_stages(twin, data, Recipe(tune=0), plan=[0.9], target=0.9, max_drop=1e-6)
    result.release()
    assert result.rolled_back
    assert validated(data)(twin) == before
    assert all((w != 0).all() for w in weights(twin))


SCRIPT = """
import os, sys, time
import torch
from resu.experiments.spinn import sparse
from tests.experiments.spinn.conftest import made_up
from tests.experiments.spinn.test_sparse import RECIPE, twin_of

plain, calls = sparse.fit, []
def slow(*args, **options):
    calls.append(1)
    if len(calls) == 3 and sys.argv[2] == "die":
        print("stage 3", flush=True)
        time.sleep(60)
    return plain(*args, **options)
sparse.fit = slow
torch.set_num_threads(1)
data = made_up().prepare()
twin = twin_of(data)
torch.manual_seed(7)
told = []
say = lambda *what: told.append(what[2])
sparse.prune_in_stages(twin, data, RECIPE, checkpoints=sys.argv[1], progress=say).release()
torch.save(twin.state_dict(), sys.argv[1] + "/end.pt")
print(told[0], len(calls), flush=True)
"""


def run(folder, what, repo):
    command = [sys.executable, "-c", SCRIPT, str(folder), what]
    return subprocess.Popen(
        command, cwd=repo, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_killed_in_stage_three_it_goes_on_there_and_ends_alike(tmp_path, repo):
    killed = run(tmp_path / "killed", "die", repo)
    assert killed.stdout.readline() == "stage 3\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert "stage-02.safetensors" in {file.name for file in (tmp_path / "killed").iterdir()}
    again, whole = run(tmp_path / "killed", "live", repo), run(tmp_path / "whole", "live", repo)
    # The dense network is trained anew with the same seed; then only stages 3 and 4 run.
    assert again.communicate()[0] == "resumed after stage 2 2\n"
    assert whole.communicate()[0] == "stage 1: to 25.99 % 4\n"
    first, second = (torch.load(tmp_path / n / "end.pt", weights_only=True) for n in ("killed", "whole"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_neurons_go_and_the_smaller_network_is_the_masked_one(data):
    twin = twin_of(data)
    before = copy.deepcopy(twin.state_dict())
    smaller, difference = remove_neurons(twin, data, RECIPE, target=0.5)
    assert difference < 1e-9
    full = sum(p.numel() for p in twin.network.parameters())
    assert sum(p.numel() for p in smaller.network.parameters()) <= 0.5 * full + 1
    assert all(a < b for a, b in zip(widths(smaller.network), widths(twin.network), strict=True))
    assert all(torch.equal(before[name], value) for name, value in twin.state_dict().items())
    assert smaller.predict(data.inputs).shape == data.targets.shape


def test_resurrection_keeps_the_count_and_lets_weights_return(data):
    twin = twin_of(data)
    found = resurrect(twin, data, RECIPE, sparsity=0.7)
    total = sum(w.numel() for w in weights(found))
    gone = sum(int((w == 0).sum()) for w in weights(found))
    assert gone == int(total * 0.7 + 1e-9)
    assert kept(found) == total - gone + sum(HIDDEN) + 1
    moved = 0
    for before, after in zip(weights(twin), weights(found), strict=True):
        order = before.detach().abs().flatten().argsort(descending=True)
        largest = order[: int((after != 0).sum())]
        moved += int((after.flatten()[largest] == 0).sum())
    assert moved > 0  # the mask is no longer that of the largest weights at the start


def test_a_damaged_checkpoint_is_named(data, tmp_path):
    twin = twin_of(data)
    start = copy.deepcopy(twin.state_dict())
    prune_in_stages(twin, data, RECIPE, checkpoints=tmp_path).release()
    file = tmp_path / "stage-04.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    twin.load_state_dict(start)
    with pytest.raises(FileFormatError, match=r"stage-04\.safetensors"):
        prune_in_stages(twin, data, RECIPE, checkpoints=tmp_path)
