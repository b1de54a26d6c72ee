"""Updates within the backward pass: the same bits as the plain optimizer, one gradient at a time."""

import copy
import warnings

import pytest
import torch
from torch import nn

from resu.core.peak_memory import measure_memory
from resu.modules.convert import convert_to_resu, get_resu_modules, resurrection_parameters
from resu.modules.linear import RESULinear
from resu.training import Sparsifier, Static
from resu.training.update_in_backward import optimizer_in_backward
from tests.training.helpers import batches, loss_of, mlp

OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01),
    "amsgrad": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True, maximize=True),
}
DATA = batches(8)


def _model(mode="dense", seed=0):
    model = mlp(seed)
    if mode == "dense":
        return model
    convert_to_resu(model)
    for layer in get_resu_modules(model).values():
        layer.prune_by_magnitude(0.5)
        if mode == "resu":
            layer.enter_resu_mode()
        elif mode == "qresu":
            layer.enter_qresu_mode(bits=4)
    return model


def _trained(model, mode):
    if mode in ("dense", "sparse"):
        return list(model.parameters())
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    return [*resurrection_parameters(model), *biases]


def _fit(model, optimizer, scheduler=None, begin=0, end=8):
    for batch in DATA[begin:end]:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def _same(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def _same_state(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    for key, state in first["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(second["state"][key][name])), (key, name)


@pytest.mark.parametrize("mode", ["dense", "sparse", "resu", "qresu"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_bits_as_the_plain_optimizer(mode, name):
    torch.manual_seed(3)
    plain = _model(mode)
    other = copy.deepcopy(plain)
    expected = OPTIMIZERS[name](_trained(plain, mode))
    optimizer = optimizer_in_backward(_trained(other, mode), OPTIMIZERS[name])
    _fit(plain, expected, torch.optim.lr_scheduler.CosineAnnealingLR(expected, 8))
    _fit(other, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8))
    _same(plain, other)
    _same_state(expected, optimizer)


def test_active_weights_stay_bit_identical_under_decay():
    model = _model("resu")
    layer = model[0]
    before = layer.active_values().clone()
    theta = layer.theta_values().clone()
    optimizer = optimizer_in_backward(_trained(model, "resu"), OPTIMIZERS["adamw"])
    _fit(model, optimizer)
    assert torch.equal(layer.active_values(), before)
    assert not torch.equal(layer.theta_values(), theta)
    layer.exit_resu_mode()


@pytest.mark.parametrize("late", [False, True])
def test_masks_hold_whichever_came_first(late):
    plain, other = mlp(), mlp()
    mask = {n: torch.rand(p.shape) < 0.5 for n, p in plain.named_parameters() if p.ndim == 2}

    def prune(model):
        convert_to_resu(model)
        for name, layer in get_resu_modules(model).items():
            layer.set_mask(mask[f"{name}.weight"])

    prune(plain)
    expected = OPTIMIZERS["sgd"](plain.parameters())
    if not late:
        prune(other)
    optimizer = optimizer_in_backward(other.parameters(), OPTIMIZERS["sgd"])
    if late:
        prune(other)
    _fit(plain, expected)
    _fit(other, optimizer)
    _same(plain, other)
    _same_state(expected, optimizer)


def test_a_driver_can_stand_beside_it():
    plain, other = mlp(), mlp()
    expected = OPTIMIZERS["adamw"](plain.parameters())
    optimizer = optimizer_in_backward(other.parameters(), OPTIMIZERS["adamw"])
    drivers = [Sparsifier(m, o, Static(sparsity=0.5), seed=1) for m, o in ((plain, expected), (other, optimizer))]
    _fit(plain, expected)
    _fit(other, optimizer)
    _same(plain, other)
    assert drivers[0].masks == drivers[1].masks
    assert drivers[1].step == len(DATA)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("towards", ["plain", "in_backward"])
def test_a_state_goes_on_in_either(name, towards):
    whole = mlp()
    optimizer = OPTIMIZERS[name](whole.parameters())
    _fit(whole, optimizer)

    def make(kind, model):
        if kind == "plain":
            return OPTIMIZERS[name](model.parameters())
        return optimizer_in_backward(model.parameters(), OPTIMIZERS[name])

    first = mlp()
    begun = make("in_backward" if towards == "plain" else "plain", first)
    _fit(first, begun, end=4)
    second = mlp(seed=7)
    second.load_state_dict(first.state_dict())
    resumed = make(towards, second)
    resumed.load_state_dict(copy.deepcopy(begun.state_dict()))
    _fit(second, resumed, begin=4)
    _same(whole, second)
    _same_state(optimizer, resumed)


@pytest.fixture
def low_bits():
    """torchao's optimizers, run without a compiler."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it says when it is loaded is not ours
        optim = pytest.importorskip("torchao.optim")
    torch.compiler.set_stance("force_eager")
    yield optim
    torch.compiler.set_stance("default")


def test_eight_bit_state_is_saved_and_loaded(low_bits):
    def factory(groups):
        return low_bits.AdamW8bit(groups, lr=0.01)

    def model(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 5))

    data = [(torch.randn(8, 64), torch.randint(5, (8,))) for _ in range(6)]

    def fit(network, optimizer, begin, end):
        for batch in data[begin:end]:
            loss_of(network, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, part, resumed = model(0), model(0), model(1)
    expected = optimizer_in_backward(whole.parameters(), factory)
    fit(whole, expected, 0, 6)
    begun = optimizer_in_backward(part.parameters(), factory)
    fit(part, begun, 0, 3)
    resumed.load_state_dict(part.state_dict())
    going_on = optimizer_in_backward(resumed.parameters(), factory)
    going_on.load_state_dict(begun.state_dict())
    fit(resumed, going_on, 3, 6)
    _same(whole, resumed)


def test_groups_have_their_options_and_schedules():
    plain, other = mlp(), mlp()

    def groups(model):
        return [
            {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.3},
            {"params": [p for p in model.parameters() if p.ndim == 1], "lr": 0.5},
        ]

    expected, optimizer = OPTIMIZERS["sgd"](groups(plain)), optimizer_in_backward(groups(other), OPTIMIZERS["sgd"])
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, [0.1, 0.5], total_steps=8) for o in (expected, optimizer)]
    _fit(plain, expected, schedules[0])
    _fit(other, optimizer, schedules[1])
    _same(plain, other)
    _same_state(expected, optimizer)


def test_named_parameters_and_a_closure():
    model, plain = mlp(), mlp()
    optimizer = optimizer_in_backward(model.named_parameters(), OPTIMIZERS["adamw"])
    expected = OPTIMIZERS["adamw"](plain.parameters())

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, DATA[0])
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    _fit(plain, expected, end=1)
    assert loss.item() == loss_of(mlp(), DATA[0]).item()
    _same(model, plain)


def test_a_gradient_that_was_set_by_hand_is_applied_at_the_step():
    model, plain = mlp(), mlp()
    optimizer = optimizer_in_backward(model.parameters(), OPTIMIZERS["adamw"])
    expected = OPTIMIZERS["adamw"](plain.parameters())
    for one in (*model.parameters(), *plain.parameters()):
        one.grad = torch.ones_like(one)
    optimizer.step()
    expected.step()
    _same(model, plain)
    assert all(p.grad is None for p in model.parameters())


def test_accumulation_is_refused():
    model = mlp()
    optimizer = optimizer_in_backward(model.parameters(), OPTIMIZERS["adamw"])
    loss_of(model, DATA[0]).backward()
    with pytest.raises(RuntimeError, match=r"cannot be accumulated over passes.*Call step\(\)"):
        loss_of(model, DATA[1]).backward()
    optimizer.zero_grad()
    loss_of(model, DATA[1]).backward()  # begun anew


def test_a_shared_weight_has_one_update():
    plain, other = nn.Linear(6, 6), nn.Linear(6, 6)
    other.load_state_dict(plain.state_dict())
    expected = OPTIMIZERS["adamw"](plain.parameters())
    optimizer = optimizer_in_backward(other.parameters(), OPTIMIZERS["adamw"])
    x = torch.randn(3, 6)
    for model, made in ((plain, expected), (other, optimizer)):
        model(model(x).relu()).square().sum().backward()
        made.step()
    _same(plain, other)


def test_a_grad_scaler_is_refused():
    model = mlp()
    optimizer = optimizer_in_backward(model.parameters(), OPTIMIZERS["adamw"])
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, DATA[0])).backward()
    with pytest.raises(RuntimeError, match="GradScaler cannot be used with an update in the backward pass"):
        scaler.step(optimizer)


@pytest.mark.parametrize("setting", [{"accumulation": 2}, {"max_norm": 1.0}, {"scaler": True}])
def test_settings_that_need_all_gradients_are_refused(setting):
    optimizer = optimizer_in_backward(mlp().parameters(), OPTIMIZERS["adamw"])
    optimizer.check(accumulation=1, max_norm=0.0, scaler=False)
    with pytest.raises(ValueError, match=r"turn one of the two off|use bfloat16"):
        optimizer.check(**setting)


def test_what_a_factory_must_make():
    with pytest.raises(TypeError, match=r"the factory must make a torch\.optim"):
        optimizer_in_backward(mlp().parameters(), lambda groups: None)


def test_after_remove_gradients_last():
    model = mlp()
    optimizer = optimizer_in_backward(model.parameters(), OPTIMIZERS["adamw"])
    optimizer.remove()
    loss_of(model, DATA[0]).backward()
    assert all(p.grad is not None for p in model.parameters())


def _stack(depth, width, mode):
    torch.manual_seed(0)
    layers = [RESULinear(width, width, bias=False) for _ in range(depth)]
    for layer in layers:
        layer.prune_by_magnitude(0.5)
        if mode == "qresu":
            layer.enter_qresu_mode(bits=4)
        else:
            layer.enter_resu_mode()
    return nn.Sequential(*layers)


@pytest.mark.parametrize("mode", ["resu", "qresu"])
def test_the_peak_is_one_gradient_instead_of_all(mode):
    depth, width = 8, 512
    peaks = {}
    for where in ("plain", "in_backward"):
        model = _stack(depth, width, mode)
        trained = resurrection_parameters(model)

        def factory(groups):
            return torch.optim.Adam(groups, lr=1e-3, fused=True)

        optimizer = factory(trained) if where == "plain" else optimizer_in_backward(trained, factory)
        x = torch.randn(2, width)

        def step(model=model, optimizer=optimizer, x=x):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        step()  # makes the optimizer's state
        with measure_memory() as used:
            step()
        peaks[where] = used.peak
    one = trained[0].nbytes
    assert peaks["plain"] > depth * one
    tile = 4 * width * width if mode == "qresu" else 0  # and rows of it on the way
    assert peaks["in_backward"] < 1.2 * one + 2 * tile
