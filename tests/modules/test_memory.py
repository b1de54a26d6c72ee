"""Bytes: measured ones add up to the tensors, predicted ones equal measured ones, no dense gradient appears."""

import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from resu.modules.convert import convert_to_resu, get_resu_modules, resurrection_parameters
from resu.modules.linear import RESULinear
from resu.modules.memory import KINDS, memory_report, predict_memory
from tests.modules.helpers import enter, small_model

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


def _everything(layer, optimizer):
    """Bytes of every distinct storage reachable from the layer and the optimizer."""
    tensors = [*layer.parameters(), *layer.buffers(), *[p.grad for p in layer.parameters() if p.grad is not None]]
    tensors += [v for state in optimizer.state.values() for v in state.values()] if optimizer else []
    tensors += [v for v in vars(layer).values() if isinstance(v, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _trained(mode, sparsity, shape=(192, 256), theta_dtype=None):
    torch.manual_seed(0)
    layer = RESULinear(shape[1], shape[0], bias=False)
    if mode == "dense":
        parameters = [layer.weight]
    else:
        layer.prune_by_magnitude(sparsity)
        parameters = [layer.weight]
    if mode == "resu":
        layer.enter_resu_mode()
    elif mode.startswith("qresu") and mode != "qresu_selective":
        layer.enter_qresu_mode(bits=int(mode[-1]), theta_dtype=theta_dtype)
        parameters = [layer.theta]
    elif mode == "qresu_selective":
        layer.enter_qresu_selective_mode()
        parameters = []
    optimizer = torch.optim.Adam(parameters) if parameters else None
    layer(torch.randn(4, shape[1])).square().sum().backward()
    if optimizer:
        optimizer.step()
    return layer, optimizer


@pytest.mark.parametrize("sparsity", LEVELS)
@pytest.mark.parametrize("mode", ["dense", "sparse", "resu", "qresu4", "qresu8", "qresu_selective"])
def test_predicted_equals_measured_equals_held(mode, sparsity):
    layer, optimizer = _trained(mode, sparsity)
    report = memory_report(layer, optimizer)
    assert report.total == _everything(layer, optimizer)
    bits = 8 if mode == "qresu8" else 4
    predicted = predict_memory([("w", (192, 256))], mode.rstrip("48"), sparsity, bits=bits)
    for kind in KINDS:
        assert predicted.by_kind[kind] == pytest.approx(report.by_kind[kind], rel=0.03, abs=8), kind
    assert predicted.total == pytest.approx(report.total, rel=0.001)


@pytest.mark.parametrize("sparsity", LEVELS)
def test_documented_bytes_per_weight_and_qresu_below_resu(sparsity):
    n = 1024 * 1024
    held = {}
    for mode, bits, theta in [("resu", 4, None), ("qresu", 4, None), ("qresu", 8, None), ("qresu", 4, torch.bfloat16)]:
        layer = RESULinear(1024, 1024, bias=False)
        layer.set_mask(torch.rand(1024, 1024) >= sparsity)
        layer.enter_resu_mode() if mode == "resu" else layer.enter_qresu_mode(bits=bits, theta_dtype=theta)
        s = layer.sparsity
        held[mode, bits, theta] = memory_report(layer).total / n
        each = 2 if theta else 4
        formula = 4 + 1 / 8 if mode == "resu" else bits / 8 * (1 - s) + 1 / 8 + each * s
        assert held[mode, bits, theta] == pytest.approx(formula, rel=0.03)
    assert max(v for (mode, *_), v in held.items() if mode == "qresu") < held["resu", 4, None]


def test_trainable_state_at_half_sparsity_is_within_the_aim():
    layer, optimizer = _trained("qresu4", 0.5, (1024, 1024))
    layer.theta.grad = None  # between steps
    assert memory_report(layer, optimizer).total / 1024**2 <= 6.5


def test_whole_model_with_optimizer_biases_and_ties():
    model = convert_to_resu(small_model(), exclude="5")
    enter(model[0], "qresu4")
    enter(model[3], "resu")
    parameters = [*resurrection_parameters(model), *model[5].parameters()]
    optimizer = torch.optim.AdamW(parameters)
    model(torch.randn(2, 1, 6, 6)).sum().backward()
    optimizer.step()
    report = memory_report(model, optimizer)
    expected = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    expected += sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    expected += sum(v.nbytes for state in optimizer.state.values() for v in state.values())
    expected += sum(m._offsets.nbytes for m in get_resu_modules(model).values() if m._offsets is not None)
    assert report.total == expected
    text = str(report)
    assert {"layer", "QRESU", "RESU", "theta", "total"} <= set(text.split())
    assert len({len(line) for line in text.splitlines() if line.startswith("-")}) == 1
    assert report.to_dict()["total"] == report.total


def test_state_of_the_optimizer_before_is_found():
    layer = RESULinear(24, 16, bias=False)
    optimizer = torch.optim.Adam([layer.weight])
    layer(torch.randn(2, 24)).sum().backward()
    optimizer.step()
    enter(layer, "qresu4")
    assert memory_report(layer, optimizer).by_kind["optimizer"] >= 2 * 4 * 24 * 16


def test_exit_gives_everything_back():
    layer = RESULinear(64, 64, bias=False)
    before = memory_report(layer).total
    for mode in ("resu", "qresu4", "qresu_selective"):
        enter(layer, mode)
        layer(torch.randn(2, 64)).sum().backward()
        layer.exit_resu_mode() if mode == "resu" else layer.exit_qresu_mode()
        assert memory_report(layer).total == before


def test_unknown_names():
    for arguments in ({"mode": "half"}, {"optimizer": "lion"}, {"bits": 5}, {"sparsity": 1.0}):
        with pytest.raises(ValueError, match=r"half|lion|bits|sparsity"):
            predict_memory([("w", (4, 4))], **{"mode": "qresu", "sparsity": 0.5, **arguments})


class _Largest(TorchDispatchMode):
    """Remembers the largest float tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(("mode", "size"), [("qresu4", 4096), ("qresu8", 2048), ("qresu_selective", 2048)])
def test_no_tensor_of_the_weights_size_appears_in_a_step(mode, size):
    n = size * size
    layer = RESULinear(size, size, bias=False)
    layer.set_mask(torch.rand(size, size, generator=torch.Generator().manual_seed(0)) >= 0.5)
    enter_call = {
        "qresu4": lambda: layer.enter_qresu_mode(4),
        "qresu8": lambda: layer.enter_qresu_mode(8),
        "qresu_selective": lambda: layer.enter_qresu_selective_mode(4),
    }
    enter_call[mode]()
    gc.collect()
    x = torch.randn(8, size, requires_grad=True)
    layer(x).sum().backward()  # first use: tables and thread pools
    layer.theta.grad = x.grad = None
    with _Largest() as spy:
        layer(x).square().sum().backward()
    # θ and its gradient (half the weights) are the largest things there are.
    assert spy.largest <= 4 * layer.mask.n_pruned + 8
    with torch.profiler.profile(profile_memory=True) as profile:
        layer(x).square().sum().backward()
    running = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        running += event.nbytes()
        peak = max(peak, running)
    gradient = 4 * layer.mask.n_pruned
    beside = peak - gradient
    assert peak > 0
    if size == 4096:  # beside the gradient of θ: one tile, its indices, activations
        assert beside < 0.35 * 4 * n
