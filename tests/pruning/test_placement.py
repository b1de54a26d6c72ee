"""Computing elsewhere than where the model lies; the other device is a copy in main memory here."""

import copy

import pytest
import torch
from torch import nn

from resu.pruning import layerwise
from resu.pruning.one_shot import prune_model
from resu.pruning.placement import Placement
from tests.pruning import hf_models


class Elsewhere(Placement):
    """As if the device were another: everything that is computed has to be moved, and back."""

    largest = 0

    def __init__(self, *args):
        super().__init__(*args)
        self.home = {t.data_ptr() for t in [*self.model.parameters(), *self.model.buffers()]}

    def _is_away(self, tensor):
        return tensor.data_ptr() in self.home

    def _copied(self, data):
        return data.clone()

    def here(self, *modules, without=()):
        inner = super().here(*modules, without=without)
        outside = self

        class Counted:
            def __enter__(self):
                inner.__enter__()
                away = sum(t.numel() for t in outside.model.parameters() if not outside._is_away(t))
                Elsewhere.largest = max(Elsewhere.largest, away)

            def __exit__(self, *error):
                return inner.__exit__(*error)

        return Counted()


@pytest.mark.parametrize("make", [hf_models.llama, hf_models.gpt2, hf_models.mixtral, hf_models.t5])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_model_that_is_moved_block_by_block_is_pruned_the_same(make, method, monkeypatch):
    model, batches = make(), hf_models.token_batches(2)
    if make is hf_models.t5:
        batches = [batch | {"decoder_input_ids": batch["input_ids"][:, :6]} for batch in batches]
    whole = copy.deepcopy(model)
    expected = prune_model(whole, 0.5, method, calibration=batches)
    memory = [(id(p), p.data_ptr()) for p in model.parameters()]
    monkeypatch.setattr(layerwise, "Placement", Elsewhere)
    Elsewhere.largest = 0
    result = prune_model(model, 0.5, method, calibration=batches)
    assert [(id(p), p.data_ptr()) for p in model.parameters()] == memory
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))
    assert all(torch.equal(mask, expected.masks[name]) for name, mask in result.masks.items())
    assert Elsewhere.largest > 0


def test_one_block_at_a_time_is_there(monkeypatch):
    model, batches = hf_models.llama(layers=6), hf_models.token_batches(1)
    monkeypatch.setattr(layerwise, "Placement", Elsewhere)
    Elsewhere.largest = 0
    with layerwise.Walk(model, *_targets(model), batches) as walk:
        walk.go({"inputs"}, lambda unit, inputs: None)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    rest = sum(p.numel() for p in model.parameters()) - 6 * block
    assert rest < Elsewhere.largest <= rest + block


def _targets(model):
    from resu.pruning.targets import pruning_targets

    return (pruning_targets(model)[0],)


def test_what_is_written_there_comes_home_also_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].running_mean.fill_(3)
    place, memory = Elsewhere(model, None), [p.data_ptr() for p in model.parameters()]

    def fill():
        assert model[0].weight.data_ptr() not in memory
        model[0].weight.fill_(7)
        raise RuntimeError("there")

    with pytest.raises(RuntimeError, match="there"), torch.no_grad(), place.here(model):
        fill()
    assert [p.data_ptr() for p in model.parameters()] == memory
    assert model[0].weight.eq(7).all()
    assert model[1].running_mean.eq(3).all()


def test_ties_are_moved_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    place = Elsewhere(model, None)
    with torch.no_grad(), place.here(model):
        assert model[1].weight is model[0].weight
        model[0].weight.fill_(1)
    assert model[1].weight.eq(1).all()


def test_the_meta_device_computes_nothing():
    with pytest.raises(ValueError, match="meta device; give 'cpu' or 'cuda'"):
        Placement(nn.Linear(2, 2), "meta")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_said():
    with pytest.raises(ValueError, match="'cuda' is asked for, and torch sees no CUDA device"):
        prune_model(nn.Linear(2, 2), 0.5, "wanda", calibration=torch.ones(1, 2), device="cuda")
