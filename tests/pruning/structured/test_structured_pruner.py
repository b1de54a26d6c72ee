"""The pruner: scores, scopes, rounding, targets, masks, steps, undo, errors."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resu.pruning.pruners import GradualPruner, StructuredPruner, create_pruner, prune_iteratively
from resu.pruning.structured import target as targets
from resu.pruning.structured.files import load_shrunk, save_shrunk
from resu.pruning.structured.groups import find_structure
from resu.pruning.structured.scores import unit_scores
from resu.pruning.structured.sizes import Latency, count_macs, count_parameters
from resu.pruning.structured.slots import slots
from resu.pruning.structured.steps import GradualShrinker, shrink_iteratively

X = torch.zeros(1, 3, 8, 8)


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(24 * 16, 20), nn.ReLU(), nn.Linear(20, 5),
    )  # fmt: skip


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


DATA = [(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 3]))]


def test_scores_add_up_over_all_weights_coupled():
    model = net()
    groups = find_structure(model, X).groups
    a, b, c = (model[k].weight.detach().double() for k in (0, 3, 6))
    l1, l2 = unit_scores(model, groups, "l1"), unit_scores(model, groups, "l2")
    for i in range(16):
        assert float(l1["0"][i]) == pytest.approx(float(a[i].abs().sum() + b[:, i].abs().sum()))
        assert float(l2["0"][i]) == pytest.approx(float((a[i].square().sum() + b[:, i].square().sum()).sqrt()))
    want = [b[i].abs().sum() + c[:, 16 * i : 16 * i + 16].abs().sum() for i in range(24)]
    torch.testing.assert_close(l1["3"], torch.stack(want))
    torch.testing.assert_close(unit_scores(model, groups, "magnitude")["3"], l1["3"], rtol=1e-6, atol=0)
    model.eval()
    loss(model, DATA[0]).backward()
    taylor = unit_scores(model, groups, "taylor")["0"]
    want = (model[0].weight * model[0].weight.grad).abs().sum((1, 2, 3)) + (
        model[3].weight * model[3].weight.grad
    ).abs().sum((0, 2, 3))
    torch.testing.assert_close(taylor, want.double(), rtol=1e-5, atol=1e-8)
    model.zero_grad()
    again = unit_scores(model, groups, "taylor", DATA, loss_fn=loss)["0"]
    torch.testing.assert_close(again, taylor, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="needs gradients"):
        unit_scores(model, groups, "taylor")
    assert len(unit_scores(model, groups, "wanda", [DATA[0][0]])["6"]) == 20


def test_lowest_scores_go_and_what_is_left_keeps_its_bits():
    model = net()
    before = copy.deepcopy(model)
    scores = unit_scores(model, find_structure(model, X).groups, "l1")["0"]
    result = StructuredPruner(0.5, X, importance="l1").prune(model)
    kept = result.slices["0.weight"][0]
    assert kept.tolist() == sorted(scores.argsort(descending=True)[:8].tolist())
    assert torch.equal(model[0].weight, before[0].weight[kept])
    assert torch.equal(model[1].running_var, before[1].running_var[kept])


def test_globs_and_scopes():
    model = net()
    assert StructuredPruner({"0": 0.5, "6": 0.25}, X).prune(model).units == {"0": (16, 8), "6": (20, 15)}
    assert StructuredPruner(0.5, X, include="3").prune(net()).units == {"3": (24, 12)}
    assert set(StructuredPruner(0.5, X, exclude=["3", "8"]).prune(net()).units) == {"0", "6"}
    model = net()
    with torch.no_grad():
        model[0].weight[:14].mul_(1e-3)
        model[3].weight[:, :14].mul_(1e-3)
    units = StructuredPruner(14 / 60, X, scope="global").prune(model).units
    assert sum(a - b for a, b in units.values()) == 14
    assert units["0"] == (16, 2)
    everything = StructuredPruner(0.99, X, scope="global").prune(net()).units
    assert all(after >= 1 for _, after in everything.values())
    assert sum(after for _, after in everything.values()) == 3


def test_rounding():
    model = net()
    assert StructuredPruner(0.6, X, round_to=8).prune(model).units == {"0": (16, 8), "3": (24, 16), "6": (20, 8)}


@pytest.mark.parametrize("target", ["parameters", "macs"])
def test_targets_that_are_counted(target):
    model = net()
    count = count_parameters if target == "parameters" else lambda m: count_macs(m, X)
    whole = count(model)
    result = StructuredPruner(0.5, X, target=target, scope="global").prune(model)
    assert 0.475 * whole <= count(model) <= 0.5 * whole
    assert result.reached.met
    assert result.reached.reached == pytest.approx(1 - count(model) / whole)
    with pytest.raises(ValueError, match="cannot be reduced by 99%"):
        StructuredPruner(0.99, X, target=target, exclude="6").prune(net())


def test_latency_is_bisected(monkeypatch):
    model = net()
    whole = count_parameters(model)

    def fake(models, inputs, **_):
        a, b = (count_parameters(m) / whole for m in models)
        return Latency((a, b), (1.0, b / a))

    monkeypatch.setattr(targets, "latencies", fake)
    result = StructuredPruner(0.4, X, target="latency").prune(model)
    assert result.reached.met
    assert count_parameters(model) == pytest.approx(0.6 * whole, rel=0.05)
    with pytest.raises(ValueError, match="latency cannot be reduced by 99%"):
        StructuredPruner(0.99, X, target="latency", include="0").prune(net())


def test_latency_that_falls_in_steps_is_met_by_some_of_the_groups(monkeypatch):
    """Both layers get faster at half of their units, and nowhere else: so one of them has to keep more."""

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

    def fake(models, inputs, **_):
        times = [0.5 + sum(0.25 * (m[k].out_features > 8) for k in (0, 2)) for m in models]
        return Latency(tuple(times), tuple(t / times[0] for t in times))

    monkeypatch.setattr(targets, "latencies", fake)
    model = net()
    result = StructuredPruner(0.25, torch.zeros(1, 4), target="latency").prune(model)
    assert result.reached.met
    assert sorted(model[k].out_features > 8 for k in (0, 2)) == [False, True]


def test_undo_is_exact():
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    loss(model, DATA[0]).backward()
    optimizer.step()
    before = {name: (slot.tensor, slot.tensor.detach().clone()) for name, slot in slots(model).items()}
    text, state = repr(model), {id(p): dict(s) for p, s in optimizer.state.items()}
    StructuredPruner(0.5, X).prune(model, optimizer).undo()
    assert repr(model) == text
    assert all(slots(model)[n].tensor is t and torch.equal(t, v) for n, (t, v) in before.items())
    assert {id(p): dict(s) for p, s in optimizer.state.items()} == state
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]


def test_training_goes_on_as_if_it_had_always_been_small():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model, DATA[0]).backward()
        optimizer.step()
    StructuredPruner(0.5, X).prune(model, optimizer)
    other = copy.deepcopy(model)
    twin = torch.optim.AdamW(other.parameters(), lr=0.01)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (other, twin)):
        for _ in range(3):
            o.zero_grad()
            loss(m, DATA[0]).backward()
            o.step()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        if name != "0.bias":  # a batch norm takes it out again: its gradient is rounding alone
            torch.testing.assert_close(a, b)


def test_nothing_holds_on_to_what_was_removed():
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    loss(model, DATA[0]).backward()
    optimizer.step()
    before = [weakref.ref(p) for p in model.parameters()]
    before += [weakref.ref(s["exp_avg"]) for s in optimizer.state.values()]
    result = StructuredPruner(0.5, X).prune(model, optimizer)
    result.forget()
    gc.collect()
    alive = [ref() for ref in before if ref() is not None]
    assert [tuple(t.shape) for t in alive] == [(5,), (5,)]  # the last bias is not cut


def test_the_model_is_left_alone_by_looking():
    model = net().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags, state = [m.training for m in model.modules()], torch.get_rng_state()
    StructuredPruner(0.5, X).inspect(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert flags == [m.training for m in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_iterative_ends_where_one_shot_does():
    model, stages = net(), []
    results = shrink_iteratively(model, StructuredPruner(0.5, X), 3, lambda m, stage: stages.append(stage))
    assert stages == [1, 2, 3]
    assert [model[0].out_channels, model[3].out_channels, model[6].out_features] == [8, 12, 10]
    assert results[-1].units["0"][1] == 8
    model = net()
    whole = count_macs(model, X)
    shrink_iteratively(model, StructuredPruner(0.5, X, target="macs"), [0.2, 0.5])
    assert 0.5 * whole - 4428 < count_macs(model, X) <= 0.5 * whole  # one unit of the first layer is 4428
    with pytest.raises(ValueError, match="ascend"):
        shrink_iteratively(net(), StructuredPruner(0.5, X), [0.4, 0.3])


def test_gradual_beside_a_loop_follows_the_optimizer():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    gradual = GradualShrinker(StructuredPruner(0.5, X), optimizer, begin_step=1, end_step=7, frequency=3)
    kept_alive = []
    for _ in range(9):
        optimizer.zero_grad()
        value = loss(model, DATA[0])
        kept_alive.append(value)  # graphs of before hold on to the parameters of before
        value.backward()
        optimizer.step()
        gradual.step(model)
    assert model[0].out_channels == 8
    assert len(gradual.results) == 2
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}


def test_a_ramp_goes_on_where_it_stopped(tmp_path):
    def ramp():
        return GradualShrinker(StructuredPruner(0.5, X, target="parameters"), end_step=6, frequency=2)

    whole, first = net(), ramp()
    for _ in range(8):
        first.step(whole)
    model, before = net(), ramp()
    for _ in range(4):
        before.step(model)
    save_shrunk(model, tmp_path / "small")
    after, again = ramp(), load_shrunk(net, tmp_path / "small")
    after.load_state_dict(before.state_dict())
    for _ in range(4):
        after.step(again)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_masks_for_those_who_prune_with_masks():
    model = net()
    pruner = create_pruner("structured", sparsity=0.5, example_inputs=X)
    masks = pruner.compute_masks(model)
    assert all(
        mask.dtype == torch.bool and mask.shape == slots(model)[name].tensor.shape for name, mask in masks.items()
    )
    assert int(masks["0.weight"].flatten(1).any(1).sum()) == 8
    assert int(masks["3.weight"].flatten(2).any(2).any(0).sum()) == 8
    gradual = GradualPruner(StructuredPruner(0.5, X), final_sparsity=0.5, begin_step=0, end_step=2, frequency=1)
    model = net()
    for step in range(4):
        gradual.step(model, step)
    assert int((model[0].weight.flatten(1) != 0).any(1).sum()) == 8
    result = prune_iteratively(net(), [0.5], None, pruner=StructuredPruner(0.5, X))
    assert int(result.masks["0.weight"].flatten(1).any(1).sum()) == 8


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"example_inputs": None}, "example_inputs"),
        ({"target": "flops"}, "units, parameters, macs, latency"),
        ({"scope": "layer"}, "scope"),
        ({"importance": "tailor"}, "taylor.*l1, l2"),
        ({"round_to": 0}, "round_to"),
        ({"sparsity": {"0": 0.5}, "target": "macs"}, "no other target"),
    ],
)
def test_bad_settings(options, match):
    with pytest.raises(ValueError, match=match):
        StructuredPruner(**{"sparsity": 0.5, "example_inputs": X, **options})


def test_bad_globs_and_models():
    with pytest.raises(ValueError, match="matches no layer"):
        StructuredPruner(0.5, X, include="conv9").prune(net())
    with pytest.raises(ValueError, match="8: an output of the model"):
        StructuredPruner(0.5, X, include="8").prune(net())
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        StructuredPruner(0.5, X).prune("net")
    with pytest.raises(ValueError, match="matches no"):
        StructuredPruner({"conv9": 0.5}, X).prune(net())


def test_inputs_of_every_kind():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x, *, scale=None):
            return {"out": self.b(self.a(x).relu() * (1 if scale is None else scale)), "more": [x]}

    for inputs in (torch.zeros(1, 4), (torch.zeros(1, 4),), {"x": torch.zeros(1, 4), "scale": torch.ones(1)}):
        assert StructuredPruner(0.5, inputs).prune(Two()).units == {"a": (8, 4)}


def test_random_behaviour_is_refused_with_the_reason():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(F.dropout(self.a(x), 0.5, training=True))

    model = Noisy()
    with pytest.raises(ValueError, match="a: its outputs differ"):
        StructuredPruner(0.5, torch.ones(1, 4)).prune(model)
    assert model.a.out_features == 8
