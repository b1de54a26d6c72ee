"""Pruning calls, masks, captured norms, and every illegal or senseless call."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from resu.core.mask import SparseMask
from resu.modules.base import ModeError, RESUMode
from resu.modules.conv import RESUConv2d
from resu.modules.linear import RESULinear
from tests.modules.helpers import LAYERS, THETA_MODES, enter, sample


def _lowest_pruned(scores, count):
    """Positions that go: the lowest scores, among equal ones the higher index first."""
    order = sorted(range(scores.numel()), key=lambda i: (float(scores.view(-1)[i]), -i))
    mask = torch.ones(scores.numel(), dtype=torch.bool)
    mask[order[:count]] = False
    return mask.view(scores.shape)


@pytest.mark.parametrize("kind", ["linear", "linear_odd", "conv", "conv_groups"])
@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.95])
def test_magnitude_over_the_layer_and_per_row(kind, sparsity):
    layer = LAYERS[kind]()
    weight = layer.weight.detach().clone()
    layer.prune_by_magnitude(sparsity)
    n = weight.numel()
    assert torch.equal(layer.mask.mask, _lowest_pruned(weight.abs(), int(n * round(sparsity * 100)) // 100))
    assert torch.equal(layer.weight, torch.where(layer.mask.mask, weight, 0))

    layer = LAYERS[kind]()
    rows = layer.weight.detach().abs().flatten(1)
    layer.prune_by_magnitude(sparsity, global_pruning=False)
    each = rows.shape[1] * round(sparsity * 100) // 100
    expected = torch.stack([_lowest_pruned(row, each) for row in rows])
    assert torch.equal(layer.mask.mask.flatten(1), expected)


def test_equal_weights_lose_exactly_half():
    layer = RESULinear(10, 10)
    nn.init.ones_(layer.weight)
    layer.prune_by_magnitude(0.5)
    assert layer.mask.n_active == 50


@pytest.mark.parametrize("spelling", ["capture_activations", "_capture_activations"])
def test_norms_of_a_linear_layer_accumulate_over_batches(spelling):
    layer = RESULinear(24, 16)
    assert layer.activation_norms is None
    setattr(layer, spelling, True)
    batches = [torch.randn(3, 5, 24, dtype=torch.float64).float() for _ in range(3)]
    for x in batches:
        layer(x)
    setattr(layer, spelling, False)
    layer(torch.randn(2, 24))
    expected = torch.cat([b.reshape(-1, 24) for b in batches]).norm(dim=0)
    torch.testing.assert_close(layer.activation_norms, expected)
    assert layer.activation_norms.dtype == torch.float32
    assert torch.equal(layer._activation_norms, layer.activation_norms)
    layer.capture_activations = True  # starts anew
    assert layer.activation_norms is None


def test_norms_in_half_precision_do_not_overflow():
    layer = RESULinear(4, 2, dtype=torch.float16)
    layer.capture_activations = True
    layer(torch.full((2000, 4), 200.0, dtype=torch.float16))
    torch.testing.assert_close(layer.activation_norms, torch.full((4,), 200.0 * 2000**0.5))


@pytest.mark.parametrize("kind", ["conv", "conv_groups", "conv_depthwise", "conv_reflect", "conv_circular"])
def test_norms_of_a_convolution_are_those_of_the_unfolded_input(kind):
    layer = LAYERS[kind]()
    layer.capture_activations = True
    batches = [sample(layer, seed=s) for s in range(2)]
    for x in batches:
        layer(x)
    layer(batches[0][0])
    total = 0
    for x in [*batches, batches[0][:1]]:
        padded, padding = layer._padded(x)
        columns = F.unfold(padded, layer.kernel_size, layer.dilation, padding, layer.stride)
        total = total + columns.square().sum(dim=(0, 2))
    expected = total.sqrt().view(layer.in_channels, *layer.kernel_size)
    torch.testing.assert_close(layer.activation_norms, expected)


def test_wanda_per_row_against_the_paper():
    layer = RESULinear(24, 16)
    layer.capture_activations = True
    layer(torch.randn(50, 24) * torch.linspace(0.1, 3, 24))
    scores = layer.weight.detach().abs() * layer.activation_norms
    layer.prune_by_wanda(0.6, layer.activation_norms)
    expected = torch.stack([_lowest_pruned(row, 14) for row in scores])  # floor(24 * 0.6)
    assert torch.equal(layer.mask.mask, expected)
    assert layer.mode is RESUMode.SPARSE


def test_wanda_of_a_grouped_convolution_uses_each_groups_inputs():
    layer = RESUConv2d(4, 6, 3, groups=2)
    norms = torch.rand(4, 3, 3)
    weight = layer.weight.detach().clone()
    layer.prune_by_wanda(0.5, norms)
    for out in range(6):
        group = slice(0, 2) if out < 3 else slice(2, 4)
        scores = (weight[out].abs() * norms[group]).flatten()
        assert torch.equal(layer.mask.mask[out].flatten(), _lowest_pruned(scores, 9))
    again = RESUConv2d(4, 6, 3, groups=2)
    again.prune_by_wanda(0.5, torch.rand(4))


def test_set_mask_takes_both_forms_and_zeroes_exactly():
    layer = RESULinear(24, 16)
    with torch.no_grad():
        layer.weight.fill_(-1.0)
    mask = torch.rand(16, 24) > 0.5
    layer.set_mask(mask)
    assert torch.equal(layer.mask.mask, mask)
    assert not torch.signbit(layer.weight[~mask]).any()
    layer.set_mask(SparseMask(~mask))  # grown positions start at 0
    assert not layer.weight.any()
    assert layer._mask is layer.mask
    layer.remove_mask()
    assert layer.mode is RESUMode.DENSE
    assert layer.sparsity == 0.0


def test_properties_through_the_modes():
    layer = RESULinear(24, 16)
    seen = [(layer.mode, layer.is_sparse, layer.is_resu_active)]
    layer.prune_by_magnitude(0.5)
    seen.append((layer.mode, layer.is_sparse, layer.is_resu_active))
    layer.enter_qresu_mode()
    seen.append((layer.mode, layer.is_sparse, layer.is_resu_active))
    assert seen == [
        (RESUMode.DENSE, False, False), (RESUMode.SPARSE, True, False), (RESUMode.QRESU, True, True)
    ]  # fmt: skip
    assert layer.sparsity == 0.5
    assert layer._theta is layer.theta


ILLEGAL = {
    "dense": ["enter_resu_mode", "enter_qresu_mode", "enter_qresu_selective_mode", "exit_resu_mode",
              "exit_qresu_mode", "resu_step", "theta_values", "active_values"],
    "sparse": ["exit_resu_mode", "exit_qresu_mode", "resu_step", "theta_values"],
    "resu": ["enter_qresu_mode", "enter_qresu_selective_mode", "exit_qresu_mode", "prune", "wanda", "set_mask",
             "remove_mask"],
    "qresu4": ["enter_resu_mode", "enter_qresu_selective_mode", "exit_resu_mode", "resu_step", "prune", "wanda",
               "set_mask", "remove_mask"],
    "qresu_selective": ["enter_resu_mode", "enter_qresu_mode", "exit_resu_mode", "resu_step", "prune", "set_mask"],
}  # fmt: skip


@pytest.mark.parametrize(("mode", "call"), [(m, c) for m, calls in ILLEGAL.items() for c in calls])
def test_illegal_calls_name_the_mode_and_the_legal_calls(mode, call):
    layer = enter(RESULinear(24, 16), mode)
    arguments = {
        "prune": ("prune_by_magnitude", (0.5,)),
        "wanda": ("prune_by_wanda", (0.5, torch.ones(24))),
        "set_mask": ("set_mask", (torch.ones(16, 24, dtype=torch.bool),)),
    }
    name, args = arguments.get(call, (call, ()))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=layer.mode.name) as raised:
        getattr(layer, name)(*args)
    assert isinstance(raised.value, ModeError)
    assert "legal calls are" in str(raised.value)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("mode", THETA_MODES)
def test_entering_again_with_other_settings_is_an_error(mode):
    layer = enter(RESULinear(24, 16), mode)
    call = {
        RESUMode.RESU: lambda: layer.enter_resu_mode(epsilon=0.7),
        RESUMode.QRESU: lambda: layer.enter_qresu_mode(bits=4, epsilon=0.7),
        RESUMode.QRESU_SELECTIVE: lambda: layer.enter_qresu_selective_mode(bits=8),
    }[layer.mode]
    with pytest.raises(ModeError, match="other settings"):
        call()


def test_a_new_rate_is_taken_up_without_touching_theta():
    layer = enter(RESULinear(24, 16), "qresu_selective")
    theta = layer.theta.detach().clone()
    s = layer.settings
    layer.enter_qresu_selective_mode(s.bits, s.epsilon, s.qscheme, s.selective_config, lr=0.9)
    assert layer.settings.lr == 0.9
    assert torch.equal(layer.theta, theta)


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, 50, float("nan"), "0.5", None, True])
def test_senseless_sparsity(value):
    layer = RESULinear(24, 16)
    for call in (lambda: layer.prune_by_magnitude(value), lambda: layer.prune_by_wanda(value, torch.ones(24))):
        with pytest.raises((TypeError, ValueError), match="sparsity"):
            call()
    assert layer.mode is RESUMode.DENSE


def test_senseless_tensors():
    layer = RESULinear(24, 16)
    for norms, error in [
        (torch.ones(23), ValueError),
        (torch.ones(16, 24), ValueError),
        (-torch.ones(24), ValueError),
        (torch.full((24,), float("nan")), ValueError),
        (None, TypeError),
        ([1.0] * 24, TypeError),
    ]:
        with pytest.raises(error, match="activation_norms"):
            layer.prune_by_wanda(0.5, norms)
    with pytest.raises(ValueError, match="does not fit"):
        layer.set_mask(torch.ones(24, 16, dtype=torch.bool))
    with pytest.raises(TypeError, match="bool"):
        layer.set_mask(torch.ones(16, 24))
    with torch.no_grad():
        layer.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match="1 NaN or infinite"):
        layer.prune_by_magnitude(0.5)
    with pytest.raises(ValueError, match="1 NaN or infinite"):
        layer.prune_by_wanda(0.5, torch.ones(24))
    with pytest.raises(ValueError, match="activation_norms has shape"):
        RESUConv2d(3, 4, 3).prune_by_wanda(0.5, torch.ones(4))


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("enter_resu_mode", {"epsilon": -1.0}),
        ("enter_resu_mode", {"epsilon": float("nan")}),
        ("enter_resu_mode", {"lr": "fast"}),
        ("enter_resu_mode", {"selective_config": {"beta": 0.9}}),
        ("enter_qresu_mode", {"bits": 3}),
        ("enter_qresu_mode", {"qscheme": "per_block"}),
        ("enter_qresu_mode", {"theta_dtype": torch.int8}),
        ("enter_qresu_selective_mode", {"weight_decay": -0.1}),
    ],
)
def test_senseless_settings_leave_the_layer_sparse(call, arguments):
    layer = enter(RESULinear(24, 16), "sparse")
    name = next(iter(arguments))
    with pytest.raises((TypeError, ValueError), match={"qscheme": "scheme"}.get(name, name)):
        getattr(layer, call)(**arguments)
    assert layer.mode is RESUMode.SPARSE


def test_active_nan_cannot_be_quantized_and_leaves_the_layer_sparse():
    layer = enter(RESULinear(24, 16), "sparse")
    with torch.no_grad():
        layer.weight.view(-1)[layer.mask.active_indices[0]] = float("inf")
    with pytest.raises(ValueError, match="active weights"):
        layer.enter_qresu_mode()
    assert layer.mode is RESUMode.SPARSE
    assert isinstance(layer.weight, nn.Parameter)


@pytest.mark.parametrize("value", ["fast", -0.1, 1.1, float("nan"), True, None])
def test_senseless_threshold(value):
    with pytest.raises((TypeError, ValueError), match="sparse_threshold"):
        RESULinear(4, 4, sparse_threshold=value)
