"""θ starts where it is told to: bit for bit at given values, at zero, or at random as before."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resu.core.resurrection import gather_theta
from resu.modules.linear import RESULinear
from resu.modules.theta_start import start_theta
from tests.modules.helpers import LAYERS, sample


def pruned(name="linear", **options):
    """A layer in SPARSE mode, and the dense weight it had."""
    torch.manual_seed(3)
    layer = LAYERS[name](**options)
    dense = layer.weight.detach().clone()
    layer.prune_by_magnitude(0.6)
    return layer, dense


ENTER = {
    "resu": lambda layer, **k: layer.enter_resu_mode(**k),
    "qresu": lambda layer, **k: layer.enter_qresu_mode(bits=4, **k),
    "qresu_selective": lambda layer, **k: layer.enter_qresu_selective_mode(bits=8, **k),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mode", ENTER)
@pytest.mark.parametrize("name", ["linear", "linear_odd", "conv"])
def test_given_values_are_theta_bit_for_bit(name, mode, dtype):
    layer, dense = pruned(name, dtype=dtype)
    wanted = gather_theta(dense, layer.mask)
    wanted[::3] = -0.0
    given_ = wanted.clone()
    ENTER[mode](layer, init=given_)
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(layer.theta_values().view(words), wanted.view(words))
    given_.zero_()  # it was copied
    assert torch.equal(layer.theta_values().view(words), wanted.view(words))


def test_a_layer_that_starts_at_its_own_weights_is_the_dense_layer():
    layer, dense = pruned()
    layer.enter_resu_mode(init=gather_theta(dense, layer.mask))
    assert torch.equal(layer.weight, dense)
    x = sample(layer)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, dense, layer.bias))
    layer.exit_resu_mode(commit=True)
    assert torch.equal(layer.weight, dense)


@pytest.mark.parametrize("mode", ENTER)
def test_zeros_change_nothing_at_first(mode):
    layer, _ = pruned()
    ENTER[mode](layer, init="zeros")
    assert layer.theta_values().count_nonzero() == 0
    masked = layer.effective_weight().detach() * layer.mask.mask
    assert torch.equal(layer.effective_weight().detach(), masked)


def test_normal_is_what_it_was():
    thetas = []
    for options in ({}, {"init": "normal"}):
        layer, _ = pruned()
        torch.manual_seed(5)
        layer.enter_qresu_mode(bits=4, epsilon=0.3, **options)
        thetas.append(layer.theta_values())
    assert torch.equal(*thetas)


def test_another_dtype_of_theta_is_rounded_to():
    layer, dense = pruned()
    values = gather_theta(dense, layer.mask)
    layer.enter_qresu_mode(bits=4, theta_dtype=torch.bfloat16, init=values)
    assert torch.equal(layer.theta_values(), values.bfloat16())


def test_entering_again_keeps_theta():
    layer, dense = pruned()
    layer.enter_resu_mode(init=gather_theta(dense, layer.mask))
    layer.enter_resu_mode(init="zeros")
    assert torch.equal(layer.weight, dense)


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), sparsity=st.floats(0, 0.99), seed=st.integers(0, 99))
def test_start_theta_returns_one_value_per_pruned_position(rows, columns, sparsity, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = RESULinear(columns, rows)
    layer.prune_by_magnitude(sparsity)
    values = torch.randn(layer.mask.n_pruned, generator=generator)
    for init in ("normal", "zeros", values):
        theta = start_theta(init, layer.weight, layer.mask, 0.1, torch.float32)
        assert theta.shape == (layer.mask.n_pruned,)
    assert torch.equal(theta, values)


@pytest.mark.parametrize(
    ("init", "error", "says"),
    [
        ("weights", ValueError, "unknown init 'weights'; known: normal, zeros, or a tensor of values"),
        (torch.zeros(3), ValueError, r"shape \(230,\), one per pruned position.*got torch.float32 of shape \(3,\)"),
        (torch.zeros(230, dtype=torch.int64), ValueError, "must be floating values"),
        (0.5, TypeError, "must be a name"),
    ],
)
@pytest.mark.parametrize("mode", ENTER)
def test_a_wrong_start_is_refused_and_changes_nothing(mode, init, error, says):
    layer, _ = pruned()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(error, match=says):
        ENTER[mode](layer, init=init)
    assert layer.mode.name == "SPARSE"
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
