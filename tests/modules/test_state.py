"""Saving, loading, copying and converting in every mode; a resumed run equals the uninterrupted one bit for bit."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from resu.modules.base import RESUMode
from resu.modules.conv import RESUConv2d
from resu.modules.convert import convert_to_resu, get_resu_modules, resurrection_parameters
from resu.modules.linear import RESULinear
from tests.modules.helpers import MODE_OF, MODES, THETA_MODES, enter, leave, sample, small_model

ALL_MODES = pytest.mark.parametrize("mode", MODES)
KINDS = pytest.mark.parametrize(
    "make", [lambda: RESULinear(24, 16), lambda: RESUConv2d(4, 6, 3, groups=2)], ids=["linear", "conv"]
)


def _equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def _step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 1, 6, 6, generator=generator)
    y = torch.randint(0, 3, (6,), generator=generator)
    nn.functional.cross_entropy(model(x), y).backward()
    for layer in get_resu_modules(model).values():
        if layer.mode is RESUMode.RESU and layer.settings.use_selective:
            layer.resu_step()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


def _model(mode, seed=0):
    model = convert_to_resu(small_model(seed), exclude="5")
    for layer in get_resu_modules(model).values():
        enter(layer, mode)
    return model


def _optimizer(model, mode, kind):
    if mode in ("dense", "sparse"):
        parameters = list(model.parameters())
    else:
        parameters = [*resurrection_parameters(model), *model[5].parameters()]
    if kind == "adamw":
        return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.05)
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


@ALL_MODES
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("through", ["memory", "file"])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(mode, kind, through):
    if mode == "dense":
        model = convert_to_resu(small_model())
    else:
        torch.manual_seed(1)
        model = _model(mode)
    optimizer = _optimizer(model, mode, kind)
    for seed in range(4):
        _step(model, optimizer, seed)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if through == "file":
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
    else:
        saved = copy.deepcopy(saved)
    for seed in range(4, 8):
        _step(model, optimizer, seed)

    torch.manual_seed(99)
    again = convert_to_resu(small_model(5))
    again.load_state_dict(saved["model"])
    for layer in get_resu_modules(again).values():
        if layer.mode is not RESUMode.DENSE and layer.is_resu_active:
            theta = layer.theta_values().clone()
            _reenter(layer, mode)
            assert torch.equal(layer.theta_values(), theta)
    fresh = _optimizer(again, mode, kind)
    fresh.load_state_dict(saved["optimizer"])
    for seed in range(4, 8):
        _step(again, fresh, seed)
    assert _equal(model.state_dict(), again.state_dict())


def _reenter(layer, mode):
    """Enter the present mode again with the same settings, as users do after loading."""
    s = layer.settings
    if layer.mode is RESUMode.RESU:
        layer.enter_resu_mode(s.epsilon, s.use_selective, s.selective_config, s.lr)
    elif layer.mode is RESUMode.QRESU:
        layer.enter_qresu_mode(s.bits, s.epsilon, s.qscheme)
    else:
        layer.enter_qresu_selective_mode(s.bits, s.epsilon, s.qscheme, s.selective_config, s.lr, s.weight_decay)


@KINDS
@ALL_MODES
def test_state_survives_safetensors_and_restores_the_mode(make, mode):
    layer = enter(make(), mode)
    state = load(save({k: v.contiguous() for k, v in layer.state_dict().items()}))
    other = make()
    assert not other.load_state_dict(state).missing_keys
    assert other.mode is MODE_OF[mode]
    assert other.settings == layer.settings
    assert other.mask == layer.mask
    assert _equal(layer.state_dict(), other.state_dict())
    assert torch.equal(layer(sample(layer)), other(sample(layer)))


def test_keys_while_dense_are_those_of_torch():
    assert list(RESULinear(3, 2).state_dict()) == list(nn.Linear(3, 2).state_dict())
    assert list(RESUConv2d(3, 2, 1).state_dict()) == list(nn.Conv2d(3, 2, 1).state_dict())
    layer = enter(RESULinear(24, 16), "qresu4")
    leave(layer, commit=True)
    plain = nn.Linear(24, 16)
    plain.load_state_dict(layer.state_dict())
    layer.load_state_dict(plain.state_dict())


@ALL_MODES
@pytest.mark.parametrize("before", MODES)
def test_loading_into_a_layer_in_any_mode(before, mode):
    source = enter(RESULinear(24, 16), mode)
    layer = enter(RESULinear(24, 16), before, sparsity=0.3)
    weight = layer._waiting[0] if layer._waiting else layer.weight
    layer.load_state_dict(source.state_dict())
    assert layer.mode is source.mode
    assert _equal(layer.state_dict(), source.state_dict())
    assert (layer._waiting[0] if layer._waiting else layer.weight) is weight
    if layer.is_resu_active:
        layer(sample(layer)).sum().backward()
        leave(layer, commit=True)


def test_loading_the_same_mode_keeps_the_parameter_an_optimizer_owns():
    layer = enter(RESULinear(24, 16), "qresu4")
    theta = layer.theta
    state = copy.deepcopy(layer.state_dict())
    torch.optim.Adam([theta], lr=1.0)
    layer.load_state_dict(state)
    assert layer.theta is theta


def _damaged():
    def without(name):
        return lambda s: s.pop(name)

    def replaced(name, make):
        return lambda s: s.update({name: make(s[name])})

    return {
        "no theta": (without("theta"), "theta"),
        "no bits": (without("bitmask"), "bitmask"),
        "no settings": (without("resu_settings"), "resu_settings"),
        "no codes": (without("codes"), "codes"),
        "short theta": (replaced("theta", lambda t: t[:-1]), "theta has shape"),
        "short codes": (replaced("codes", lambda t: t[:-1]), "codes has shape"),
        "flipped bit": (replaced("bitmask", lambda t: t ^ 1), "shape"),
        "float codes": (replaced("codes", lambda t: t.float()), "uint8"),
        "wrong scale": (replaced("scale", lambda t: t[:3]), "scale has shape"),
        "wrong bits shape": (replaced("bitmask", lambda t: t[:, :1]), "packed mask"),
        "wrong bias": (replaced("bias", lambda t: t[:3]), "bias has shape"),
        "future version": (replaced("resu_settings", lambda t: t + 1), "version"),
        "nan settings": (replaced("resu_settings", lambda t: t * float("nan")), "settings"),
        "short settings": (replaced("resu_settings", lambda t: t[:4]), "settings"),
    }


@pytest.mark.parametrize("what", list(_damaged()))
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("before", ["dense", "sparse", "qresu8"])
def test_a_damaged_state_is_an_error_and_leaves_the_layer_as_it_was(what, strict, before):
    torch.manual_seed(0)
    state = enter(RESULinear(24, 16), "qresu4").state_dict()
    damage, text = _damaged()[what]
    damage(state)
    layer = enter(RESULinear(24, 16), before)
    known = copy.deepcopy(layer.state_dict())
    y = layer(sample(layer))
    with pytest.raises(RuntimeError, match=text):
        layer.load_state_dict(state, strict=strict)
    assert _equal(layer.state_dict(), known)
    assert torch.equal(layer(sample(layer)), y)


def test_unexpected_keys_are_reported():
    layer = RESULinear(24, 16)
    with pytest.raises(RuntimeError, match="Unexpected"):
        layer.load_state_dict({**layer.state_dict(), "other": torch.zeros(1)})


def test_a_weight_of_another_shape_is_an_error():
    with pytest.raises(RuntimeError, match="weight has shape"):
        RESULinear(24, 16).load_state_dict(nn.Linear(24, 8).state_dict())


@KINDS
@ALL_MODES
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_independent_and_enforced_on_their_own(make, mode, how):
    torch.manual_seed(0)
    layer = enter(make(), mode)
    if layer.is_resu_active:
        layer(sample(layer)).sum().backward()
    other = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    assert _equal(layer.state_dict(), other.state_dict())
    assert torch.equal(layer(sample(layer)), other(sample(layer)))
    known = copy.deepcopy(layer.state_dict())
    parameters = [p for p in other.parameters() if p is not other.bias]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
    active = other.active_values().clone() if mode != "dense" else None
    for _ in range(2):
        optimizer.zero_grad()
        other(sample(other)).square().sum().backward()
        optimizer.step()
    assert _equal(layer.state_dict(), known)
    assert not _equal(other.state_dict(), known)
    if other.mode is RESUMode.SPARSE:
        assert not other.mask.get_pruned(other.weight).any()
    elif mode != "dense":
        assert torch.equal(other.active_values(), active)
        leave(other, commit=True)
        assert layer.mode is not RESUMode.DENSE


@pytest.mark.parametrize("mode", MODES[1:])
def test_to_float64_and_back_keeps_values_and_enforcement(mode):
    torch.manual_seed(0)
    layer = enter(RESULinear(24, 16), mode)
    active = layer.active_values().clone()
    layer.to(torch.float64)
    assert layer.weight_dtype == torch.float64
    assert torch.equal(layer.active_values().float(), active)
    assert layer(sample(layer, dtype=torch.float64)).dtype == torch.float64
    parameters = [p for p in layer.parameters() if p is not layer.bias]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
    layer(sample(layer, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    layer.to(torch.float32)
    if layer.mode is not RESUMode.SPARSE:
        assert torch.equal(layer.active_values(), active)
        leave(layer, commit=True)
        assert layer.weight.dtype == torch.float32


def test_half_precision_keeps_scales_exact():
    layer = enter(RESULinear(24, 16), "qresu_selective")
    layer.bfloat16()
    assert layer.theta.dtype == torch.bfloat16
    assert {layer.scale.dtype, layer.zero.dtype, layer.theta_m.dtype, layer.theta_v.dtype} == {torch.float32}
    assert layer(sample(layer).bfloat16()).dtype == torch.bfloat16
    leave(layer, commit=True)
    assert layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("mode", MODES)
def test_nothing_keeps_a_dropped_layer_alive(mode):
    layer = enter(RESULinear(24, 16), mode)
    layer(sample(layer)).sum().backward()
    reference = weakref.ref(layer)
    del layer
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("mode", THETA_MODES)
def test_repr_names_mode_and_sparsity(mode):
    layer = enter(RESULinear(24, 16), mode)
    assert MODE_OF[mode].name in repr(layer)
    assert "sparsity=0.5990" in repr(layer)


@pytest.mark.parametrize("mode", ["qresu4", "qresu_selective", "sparse"])
def test_load_with_assign(mode):
    source = enter(RESULinear(24, 16), mode)
    layer = RESULinear(24, 16)
    layer.load_state_dict(copy.deepcopy(source.state_dict()), assign=True)
    assert _equal(layer.state_dict(), source.state_dict())
    layer(sample(layer)).sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_a_partial_state_leaves_the_layer_alone(mode):
    layer = enter(RESULinear(24, 16), mode)
    known = copy.deepcopy(layer.state_dict())
    layer.load_state_dict({}, strict=False)
    assert _equal(layer.state_dict(), known)
    layer.load_state_dict({"bias": torch.ones(16)}, strict=False)
    assert torch.equal(layer.bias, torch.ones(16))
    assert layer.mode is MODE_OF[mode]
    with pytest.raises(RuntimeError, match="Missing"):
        layer.load_state_dict({})


@pytest.mark.parametrize("mode", THETA_MODES)
def test_entering_again_after_a_conversion_is_still_a_no_op(mode):
    layer = enter(RESULinear(24, 16), mode).to(torch.float64)
    theta = layer.theta_values().clone()
    _reenter(layer, mode)
    assert torch.equal(layer.theta_values(), theta)


@pytest.mark.parametrize("mode", MODES[1:])
def test_channels_last(mode):
    torch.manual_seed(0)
    layer = RESUConv2d(4, 6, 3).to(memory_format=torch.channels_last)
    enter(layer, mode)
    layer.to(memory_format=torch.channels_last)
    x = sample(layer).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x), nn.functional.conv2d(x, layer.effective_weight(), layer.bias))
    active = layer.active_values().clone()
    parameters = [p for p in layer.parameters() if p is not layer.bias]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
    layer(x).square().sum().backward()
    optimizer.step()
    if layer.mode is RESUMode.SPARSE:
        assert not layer.mask.get_pruned(layer.weight).any()
    else:
        assert torch.equal(layer.active_values(), active)
        leave(layer, commit=True)
