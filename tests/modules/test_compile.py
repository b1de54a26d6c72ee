"""torch.compile in every mode: equal results and gradients, one graph."""

import pytest
import torch
from torch import nn

from resu.modules.base import RESUMode
from resu.modules.convert import convert_to_resu, get_resu_modules, resurrection_parameters
from resu.modules.linear import RESULinear
from tests.modules.helpers import MODES, enter, small_model


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _model(mode):
    model = convert_to_resu(small_model())
    torch.manual_seed(1)
    for layer in get_resu_modules(model).values():
        enter(layer, mode)
    return model


def _gradients(model):
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            found[name] = p.grad.clone()
    for name, layer in get_resu_modules(model).items():  # a selective layer has used its gradient up
        if layer.mode is RESUMode.QRESU_SELECTIVE:
            found[f"{name}.theta"] = layer.theta.detach().clone()
    return found


def _compare(mode, backend):
    results = []
    for compiled in (False, True):
        model = _model(mode)
        run = torch.compile(model, backend=backend, fullgraph=True) if compiled else model
        x = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(2)).requires_grad_()
        y = run(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, _gradients(model)))
    (y, gx, grads), (cy, cgx, cgrads) = results
    torch.testing.assert_close(cy, y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cgx, gx, rtol=1e-4, atol=1e-5)
    assert grads.keys() == cgrads.keys()
    for name in grads:
        torch.testing.assert_close(cgrads[name], grads[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_one_graph_with_equal_results_and_gradients(mode):
    _compare(mode, "aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor():
    torch.manual_seed(0)
    model = nn.Sequential(RESULinear(16, 24), nn.GELU(), RESULinear(24, 24), nn.GELU(), RESULinear(24, 8))
    for layer, mode in zip(get_resu_modules(model).values(), ["qresu4", "resu", "sparse"], strict=True):
        enter(layer, mode)
    x = torch.randn(4, 16)
    results = []
    for run in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        results.append([y.detach(), *[p.grad.clone() for p in model.parameters()]])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["sparse", "resu", "qresu4"])
def test_training_a_compiled_model_keeps_the_promises(mode):
    model = _model(mode)
    run = torch.compile(model, backend="aot_eager")
    layers = get_resu_modules(model).values()
    active = [layer.active_values().clone() for layer in layers]
    parameters = list(model.parameters()) if mode == "sparse" else resurrection_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)
    x, y = torch.randn(8, 1, 6, 6), torch.randint(0, 3, (8,))
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(run(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for layer, before in zip(layers, active, strict=True):
        if mode == "sparse":
            assert not layer.mask.get_pruned(layer.weight).any()
        else:
            assert torch.equal(layer.active_values(), before)


def test_a_mode_entered_after_compiling_is_seen():
    model = _model("dense")
    run = torch.compile(model, backend="aot_eager")
    x = torch.randn(4, 1, 6, 6)
    torch.testing.assert_close(run(x), model(x))
    for layer in get_resu_modules(model).values():
        enter(layer, "qresu4")
    torch.testing.assert_close(run(x), model(x))
    for layer in get_resu_modules(model).values():
        layer.exit_qresu_mode(commit=False)
    torch.testing.assert_close(run(x), model(x))
