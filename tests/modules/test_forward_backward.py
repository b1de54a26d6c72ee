"""Values and gradients in every mode, for every kind of layer, against the dense formula."""

import pytest
import torch
from torch import nn

from resu.core.resurrection import gather_theta
from resu.modules import assembled
from resu.modules.base import RESUMode
from resu.modules.linear import RESULinear
from tests.modules.helpers import LAYERS, MODES, THETA_MODES, enter, leave, reference, sample

ALL_LAYERS = pytest.mark.parametrize("kind", list(LAYERS))


def _made(kind, mode, **options):
    torch.manual_seed(0)
    return enter(LAYERS[kind](**options), mode)


@ALL_LAYERS
@pytest.mark.parametrize("mode", MODES)
def test_forward_and_gradients_equal_the_dense_formula(kind, mode):
    layer = _made(kind, mode, dtype=torch.float64)
    x = sample(layer, dtype=torch.float64).requires_grad_()
    weight = layer.effective_weight().detach().clone().requires_grad_()
    bias = None if layer.bias is None else layer.bias.detach().clone().requires_grad_()
    other = x.detach().clone().requires_grad_()

    expected = reference(layer, other, weight, bias)
    probe = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (expected * probe).sum().backward()
    theta_grad = []
    if layer.theta is not None:
        layer.theta.register_hook(theta_grad.append)
    y = layer(x)
    (y * probe).sum().backward()

    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-11, atol=1e-11)
    if bias is not None:
        torch.testing.assert_close(layer.bias.grad, bias.grad, rtol=1e-11, atol=1e-11)
    if layer.mode is RESUMode.DENSE:
        torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-11, atol=1e-11)
    elif layer.mode is RESUMode.SPARSE:
        torch.testing.assert_close(layer.weight.grad, layer.mask.apply(weight.grad), rtol=1e-11, atol=1e-11)
    elif layer.mode is RESUMode.RESU:
        assert not layer.mask.get_active(layer.weight.grad).any()
        torch.testing.assert_close(
            gather_theta(layer.weight.grad, layer.mask), gather_theta(weight.grad, layer.mask),
            rtol=1e-11, atol=1e-11,
        )  # fmt: skip
    else:
        torch.testing.assert_close(theta_grad[0], gather_theta(weight.grad, layer.mask), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["linear_odd", "conv_groups", "conv_depthwise", "conv_reflect"])
@pytest.mark.parametrize("mode", ["qresu4", "qresu8"])
def test_gradcheck(kind, mode):
    layer = _made(kind, mode, dtype=torch.float64)
    x = sample(layer, batch=2, dtype=torch.float64)
    x = (x if x.ndim == 2 else x[..., :6, :6]).contiguous().requires_grad_()
    inputs = (x, layer.theta, *([] if layer.bias is None else [layer.bias]))
    assert torch.autograd.gradcheck(lambda *_: layer(x), inputs, fast_mode=x.ndim == 4)


@ALL_LAYERS
def test_tiles_do_not_change_results(kind, monkeypatch):
    layer = _made(kind, "qresu4", dtype=torch.float64)
    x = sample(layer, dtype=torch.float64).requires_grad_()
    layer(x).square().sum().backward()
    gx, gt, y = x.grad, layer.theta.grad, layer(x).detach()
    x.grad = layer.theta.grad = None
    monkeypatch.setattr(assembled, "TILE", 40)  # a row or two per tile
    small = layer(x)
    small.square().sum().backward()
    torch.testing.assert_close(small, y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, gx, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layer.theta.grad, gt, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(24,), (2, 24), (2, 3, 24), (0, 24), (2, 0, 24)])
@pytest.mark.parametrize("mode", ["qresu4", "resu", "sparse"])
def test_linear_takes_any_leading_shape(shape, mode):
    layer = _made("linear", mode)
    x = torch.randn(shape).requires_grad_()
    y = layer(x)
    assert y.shape == (*shape[:-1], 16)
    torch.testing.assert_close(y, reference(layer, x, layer.effective_weight(), layer.bias))
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("mode", ["qresu4", "resu"])
def test_conv_takes_one_image(mode):
    layer = _made("conv", mode)
    x = sample(layer)[0]
    torch.testing.assert_close(layer(x), layer(x.unsqueeze(0))[0])


@pytest.mark.parametrize("order", ["transposed", "expanded", "strided"])
def test_inputs_that_are_not_contiguous(order):
    layer = _made("linear", "qresu4")
    x = {
        "transposed": torch.randn(24, 5).t(),
        "expanded": torch.randn(1, 24).expand(5, 24),
        "strided": torch.randn(5, 48)[:, ::2],
    }[order]
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


def test_channels_last_input():
    layer = _made("conv", "qresu4")
    x = sample(layer)
    torch.testing.assert_close(layer(x.contiguous(memory_format=torch.channels_last)), layer(x))


def test_only_what_needs_a_gradient_gets_one():
    layer = _made("linear", "qresu4")
    layer.theta.requires_grad_(False)
    x = torch.randn(3, 24, requires_grad=True)
    layer(x).sum().backward()
    assert layer.theta.grad is None
    assert x.grad is not None
    layer.theta.requires_grad_(True)
    layer(torch.randn(3, 24)).sum().backward()
    assert layer.theta.grad is not None
    with torch.no_grad():
        assert not layer(x).requires_grad


@pytest.mark.parametrize("mode", THETA_MODES)
@pytest.mark.parametrize("commit", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv_groups"])
def test_exit_merges_or_drops_theta(kind, mode, commit):
    layer = _made(kind, mode)
    mask, theta, active = layer.mask, layer.theta_values().clone(), layer.active_values().clone()
    y = layer(sample(layer)).detach()
    leave(layer, commit)
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.is_leaf
    assert torch.equal(mask.get_active(layer.weight), active)
    if commit:
        assert torch.equal(mask.get_pruned(layer.weight), theta)
        assert layer.mode is RESUMode.DENSE
        assert layer.mask is None
        torch.testing.assert_close(layer(sample(layer)), y)
    else:
        assert layer.mode is RESUMode.SPARSE
        assert layer.mask == mask
        pruned = mask.get_pruned(layer.weight)
        assert not pruned.any()
        assert not torch.signbit(pruned).any()
    for name in ("theta", "codes", "scale", "zero", "theta_m", "theta_v"):
        assert getattr(layer, name) is None
    assert layer.weight.grad is None
    if commit:
        hooks = (layer.weight._post_accumulate_grad_hooks, layer.weight._backward_hooks)
        assert not any(hooks)


def test_the_weight_is_the_same_parameter_after_qresu():
    layer = RESULinear(24, 16)
    weight = layer.weight
    optimizer = torch.optim.Adam([weight])
    layer(torch.randn(3, 24)).sum().backward()
    optimizer.step()
    enter(layer, "qresu4")
    assert weight.numel() == 0
    assert "weight" not in dict(layer.named_parameters())
    leave(layer, commit=True)
    assert layer.weight is weight
    layer(torch.randn(3, 24)).sum().backward()
    before = weight.detach().clone()
    optimizer.step()
    assert not torch.equal(weight, before)


def test_weight_in_qresu_is_made_on_demand_and_refused_by_optimizers():
    layer = _made("linear", "qresu4")
    assert torch.equal(layer.weight, layer.effective_weight())
    assert layer.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="non-leaf"):
        torch.optim.Adam([layer.weight])
    layer.weight.sum().backward()
    assert torch.equal(layer.theta.grad, torch.ones_like(layer.theta))


@pytest.mark.parametrize("sparsity", [0.0, 0.99])
@pytest.mark.parametrize("mode", THETA_MODES)
def test_extreme_sparsities(sparsity, mode):
    torch.manual_seed(0)
    layer = enter(RESULinear(24, 16), mode, sparsity)
    x = torch.randn(3, 24, requires_grad=True)
    torch.testing.assert_close(layer(x), reference(layer, x, layer.effective_weight(), layer.bias))
    layer(x).sum().backward()
    leave(layer, commit=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("mode", THETA_MODES)
def test_other_dtypes(kind, mode, dtype):
    layer = _made(kind, mode, dtype=dtype)
    x = sample(layer).to(dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, reference(layer, x, layer.effective_weight(), layer.bias), rtol=2e-2, atol=2e-2)
    y.sum().backward()
    assert x.grad.dtype == dtype
    leave(layer, commit=True)
    assert layer.weight.dtype == dtype


def test_theta_in_bf16_under_a_float_layer():
    layer = RESULinear(24, 16)
    layer.prune_by_magnitude(0.5)
    layer.enter_qresu_mode(theta_dtype=torch.bfloat16)
    assert layer.theta.dtype == torch.bfloat16
    x = torch.randn(3, 24)
    y = layer(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, reference(layer, x, layer.effective_weight(), layer.bias))
    y.sum().backward()
    assert layer.theta.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["dense", "sparse", "resu", "qresu4", "qresu_selective"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_autocast_computes_as_torch_does(kind, mode):
    layer = _made(kind, mode)
    x = sample(layer).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        expected = reference(layer, x, layer.effective_weight().float(), layer.bias)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    if mode == "qresu4":
        assert layer.theta.grad.dtype == torch.float32


def test_an_input_of_another_dtype_is_an_error_without_autocast():
    layer = _made("linear", "qresu4")
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(2, 24, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="24 inputs"):
        layer(torch.randn(2, 23))
