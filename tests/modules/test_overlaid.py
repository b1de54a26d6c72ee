"""Products with a frozen weight under θ: against the dense formula, forward and backward."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from resu.core.mask import SparseMask
from resu.core.resurrection import gather_theta
from resu.modules import overlaid
from resu.modules.overlaid import overlaid_linear, overlaid_weight


def dense(weight, thetas, masks):
    """The formula, one position after the other."""
    out = weight.clone()
    for k, (theta, mask) in enumerate(zip(thetas, masks, strict=True)):
        for value, (i, j) in zip(theta, (~mask).nonzero().tolist(), strict=True):
            out[i, j] = value.to(out.dtype) if k == 0 else out[i, j] + (value.to(out.dtype) - weight[i, j])
    return out


def parts(rows, columns, count=1, dtype=torch.float64, sparsity=0.5):
    weight = torch.randn(rows, columns, dtype=dtype)
    masks = [torch.rand(rows, columns) >= sparsity for _ in range(count)]
    thetas = [torch.randn(int((~mask).sum()), dtype=dtype) for mask in masks]
    return weight, thetas, masks, [SparseMask(mask).packed for mask in masks]


@pytest.fixture(params=[None, 5], ids=["one tile", "small tiles"])
def tiles(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(overlaid, "tile_limit", lambda device: 3 * request.param)
        monkeypatch.setattr(overlaid, "CHUNK", request.param)


@given(st.integers(1, 9), st.integers(1, 19), st.integers(1, 3), st.floats(0, 1), st.booleans())
def test_weight_and_product_equal_the_formula(rows, columns, count, sparsity, transposed):
    weight, thetas, masks, bits = parts(rows, columns, count, sparsity=sparsity)
    given_weight = weight.t().contiguous().t() if transposed else weight
    expected = dense(weight, thetas, masks)
    assert torch.equal(overlaid_weight(given_weight, thetas, bits), expected)
    x, bias = torch.randn(2, 3, columns, dtype=torch.float64), torch.randn(rows, dtype=torch.float64)
    torch.testing.assert_close(overlaid_linear(x, given_weight, bias, thetas, bits), F.linear(x, expected, bias))
    torch.testing.assert_close(overlaid_linear(x, given_weight, None, thetas, bits), F.linear(x, expected))


@pytest.mark.parametrize("count", [1, 2])
def test_gradients_are_those_of_the_dense_product(tiles, count):
    weight, thetas, masks, bits = parts(7, 11, count)
    x = torch.randn(4, 11, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    for theta in thetas:
        theta.requires_grad_()
    grad = torch.randn(4, 7, dtype=torch.float64)
    overlaid_linear(x, weight, bias, thetas, bits).backward(grad)
    reference = dense(weight, [theta.detach() for theta in thetas], masks).requires_grad_()
    other = x.detach().clone().requires_grad_()
    F.linear(other, reference).backward(grad)
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(bias.grad, grad.sum(0))
    for theta, mask in zip(thetas, masks, strict=True):
        torch.testing.assert_close(theta.grad, gather_theta(reference.grad, SparseMask(mask)))
    assert weight.grad is None


def test_gradcheck(tiles):
    weight, thetas, _, bits = parts(3, 5, 2)
    inputs = [torch.randn(2, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64), *thetas]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda x, b, *t: overlaid_linear(x, weight, b, list(t), bits), inputs)
    assert torch.autograd.gradcheck(lambda *t: overlaid_weight(weight, list(t), bits), inputs[2:])


def test_low_precision_and_wide_theta():
    weight, (theta,), (mask,), bits = parts(40, 70, dtype=torch.bfloat16)
    wide = theta.float().requires_grad_()
    x = torch.randn(6, 70, dtype=torch.bfloat16, requires_grad=True)
    y = overlaid_linear(x, weight, None, [wide], bits)
    assert torch.equal(y, F.linear(x, dense(weight, [theta], [mask])))
    y.sum().backward()
    assert wide.grad.dtype == torch.float32
    assert x.grad.dtype == torch.bfloat16


def test_autocast_multiplies_in_its_dtype():
    weight, thetas, _, bits = parts(4, 6, dtype=torch.float32)
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = overlaid_linear(x, weight, torch.randn(4), thetas, bits)
        assert y.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="dtype"):
        overlaid_linear(x.bfloat16(), weight, None, thetas, bits)
    with pytest.raises(RuntimeError, match="6 inputs"):
        overlaid_linear(x[:, :5], weight, None, thetas, bits)


def test_one_graph_when_compiled():
    weight, thetas, masks, bits = parts(4, 6, 2, dtype=torch.float32)
    thetas = [theta.requires_grad_() for theta in thetas]

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x):
        return overlaid_linear(x.relu(), weight, None, thetas, bits)

    x = torch.randn(3, 6)
    y = run(x)
    torch.testing.assert_close(y, F.linear(x.relu(), dense(weight, [t.detach() for t in thetas], masks)))
    y.sum().backward()
    assert all(theta.grad is not None for theta in thetas)


def test_operator_is_registered_as_torch_expects():
    weight, thetas, _, bits = parts(4, 6, 2, dtype=torch.float32)
    x = torch.randn(3, 6, requires_grad=True)
    torch.library.opcheck(
        torch.ops.resu.overlaid_linear.default,
        (x, weight, torch.randn(4), [theta.requires_grad_() for theta in thetas], bits),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_no_second_weight_is_kept():
    weight, thetas, _, bits = parts(64, 64, dtype=torch.float32)
    x = torch.randn(2, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        overlaid_linear(x, weight, None, [thetas[0].requires_grad_()], bits)
    assert set(kept) <= {x.data_ptr(), weight.data_ptr(), thetas[0].data_ptr(), bits[0].data_ptr()}
