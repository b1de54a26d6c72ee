"""The ways users write it, as documented: both optimizer spellings, all modes, from pruning to commit."""

import pytest
import torch
from torch import nn

import resu
from resu import RESUConv2d, RESULinear, RESUMode, convert_to_resu, get_resu_modules, resurrection_parameters
from resu.core.selective import SelectionConfig


def _data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 20, generator=generator)
    return x, (x[:, :3] @ torch.randn(3, 4, generator=generator)).argmax(dim=1)


def _train(model, optimizer, steps=20):
    x, y = _data()
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), y)
        if optimizer is None:
            model.zero_grad()
        else:
            optimizer.zero_grad()
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        losses.append(loss.item())
    return losses


def _model():
    torch.manual_seed(0)
    return convert_to_resu(nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4)))


def _layers(model):
    return [m for m in model.modules() if isinstance(m, RESULinear)]


def test_resu_with_the_weights_as_optimizer_parameters():
    model = _model()
    _train(model, torch.optim.Adam(model.parameters(), lr=0.01))
    for layer in _layers(model):
        layer.prune_by_magnitude(0.7)
        layer.enter_resu_mode(epsilon=0.1)
    active = [layer.active_values().clone() for layer in _layers(model)]
    losses = _train(model, torch.optim.Adam([layer.weight for layer in _layers(model)], lr=0.01))
    assert losses[-1] < losses[0]
    for layer, before in zip(_layers(model), active, strict=True):
        assert torch.equal(layer.active_values(), before)
        layer.exit_resu_mode(commit=True)
        assert layer.mode is RESUMode.DENSE


@pytest.mark.parametrize("name", ["_theta", "theta"])
@pytest.mark.parametrize("bits", [4, 8])
def test_qresu_with_theta_as_optimizer_parameter(name, bits):
    model = _model()
    for layer in _layers(model):
        layer.prune_by_magnitude(0.5)
        layer.enter_qresu_mode(bits=bits, epsilon=0.1, qscheme="per_channel")
    optimizer = torch.optim.Adam([getattr(layer, name) for layer in _layers(model)], lr=0.01)
    losses = _train(model, optimizer)
    assert losses[-1] < losses[0]
    for layer in _layers(model):
        assert layer.theta.is_contiguous()
        assert layer.theta.ndim == 1
        layer.exit_qresu_mode(commit=True)


def test_the_helper_gives_the_right_tensors_in_every_mode():
    for enter in ("enter_resu_mode", "enter_qresu_mode"):
        model = _model()
        for layer in _layers(model):
            layer.prune_by_magnitude(0.5)
            getattr(layer, enter)()
        optimizer = torch.optim.AdamW(resurrection_parameters(model), lr=0.01)
        losses = _train(model, optimizer)
        assert losses[-1] < losses[0]
        owned = {id(p) for p in optimizer.state}
        assert owned == {id(p) for p in resurrection_parameters(model)}


def test_selective_needs_no_optimizer():
    model = _model()
    for layer in _layers(model):
        layer.prune_by_magnitude(0.5)
        layer.enter_qresu_selective_mode(bits=8, selective_config=SelectionConfig(tau_stable=0.3), lr=0.05)
    assert resurrection_parameters(model) == []
    losses = _train(model, None, steps=40)
    assert losses[-1] < losses[0]
    assert all(0 < layer.last_update["selection_ratio"] <= 0.21 for layer in _layers(model))


def test_wanda_from_captured_activations():
    model = _model()
    x, _ = _data()
    for layer in _layers(model):
        layer.capture_activations = True
    model(x)
    for layer in _layers(model):
        layer.capture_activations = False
        layer.prune_by_wanda(0.5, layer.activation_norms)
        assert layer.sparsity == 0.5
    _train(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    assert all(layer.mask.n_pruned == int((layer.weight == 0).sum()) for layer in _layers(model))


def test_explicit_steps():
    model = _model()
    x, y = _data()
    for layer in _layers(model):
        layer.prune_by_magnitude(0.5)
        layer.enter_resu_mode(use_selective=True, lr=0.05)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        for layer in _layers(model):
            stats = layer.resu_step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert stats["n_pruned"] == 64


def test_a_cycle_by_hand_with_a_tournament():
    model = _model()
    _train(model, torch.optim.Adam(model.parameters(), lr=0.01))
    for layer in _layers(model):
        layer.prune_by_magnitude(0.8)
    for _ in range(3):
        for layer in _layers(model):
            layer.enter_qresu_mode(bits=8)
        _train(model, torch.optim.Adam([layer.theta for layer in _layers(model)], lr=0.01))
        for layer in _layers(model):
            layer.exit_qresu_mode(commit=True)
            layer.prune_by_magnitude(0.8)
        _train(model, torch.optim.Adam(model.parameters(), lr=0.01))
        for layer in _layers(model):
            assert layer.mask.n_pruned == int((layer.weight == 0).sum())


def test_names_are_found_at_the_top():
    assert resu.RESULinear is RESULinear
    assert resu.RESUConv2d is RESUConv2d
    assert set(get_resu_modules(_model())) == {"0", "2"}
    assert "total" in str(resu.memory_report(_model()))
