"""Editing weights in place by mask, word by word, against ``torch.where``; and the hook that stands on it."""

import pytest
import torch
from torch import nn

from resu.core.enforcement import Constraint
from resu.core.mask import SparseMask

SHAPES = [(1, 1), (3, 7), (16, 64), (5, 3, 3, 3), (9,), (600, 1024), (2, 0)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.complex64]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_and_restore_equal_where(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x = (10 * torch.randn(shape, generator=generator)).to(dtype)
    source = (10 * torch.randn(shape, generator=generator)).to(dtype)
    bits = torch.rand(shape, generator=generator) > 0.4
    mask = SparseMask(bits)
    zero = torch.zeros((), dtype=dtype)
    assert torch.equal(mask.zero_(x.clone(), active=True), torch.where(bits, zero, x))
    assert torch.equal(mask.apply_(x.clone()), torch.where(bits, x, zero))
    assert torch.equal(mask.restore_(x.clone(), source), torch.where(bits, source, x))


def test_nan_inf_and_minus_zero_become_plus_zero():
    x = torch.tensor([float("nan"), float("inf"), -0.0, -1.0, 5.0])
    mask = SparseMask(torch.tensor([False, False, False, False, True]))
    mask.apply_(x)
    assert x.tolist() == [0.0, 0.0, 0.0, 0.0, 5.0]
    assert not torch.signbit(x).any()


def test_layouts_that_are_not_contiguous():
    mask = SparseMask(torch.rand(4, 3, 2, 2) > 0.5)
    for x in (
        torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        torch.randn(3, 4, 2, 2).transpose(0, 1),
    ):
        expected = mask.apply(x)
        assert torch.equal(mask.apply_(x), expected)
    y = torch.randn(4, 3, 2, 2)
    assert torch.equal(mask.restore_(x, y), torch.where(mask.mask, y, x))


def test_in_place_edits_count_as_versions():
    x = torch.randn(4, 4)
    before = x._version
    SparseMask(torch.rand(4, 4) > 0.5).apply_(x)
    assert x._version > before


@pytest.mark.parametrize("kind", ["zero", "frozen"])
def test_the_gradient_is_masked_as_soon_as_it_is_accumulated(kind):
    layer = nn.Linear(6, 5)
    mask = SparseMask(torch.rand(5, 6) > 0.5)
    constraint = Constraint(layer.weight, mask, kind=kind)
    x = torch.randn(3, 6)
    layer(x).square().sum().backward()
    held = constraint.held()
    assert not layer.weight.grad[held].any()
    assert layer.weight.grad[~held].all()
    first = layer.weight.grad.clone()
    layer(x).square().sum().backward()  # accumulated on top
    torch.testing.assert_close(layer.weight.grad, 2 * first)
    constraint.remove()
    layer.weight.grad = None
    layer(x).square().sum().backward()
    assert layer.weight.grad.all()


def test_a_gradient_that_something_else_holds_is_not_edited():
    weight = nn.Parameter(torch.randn(4, 4))
    mask = SparseMask(torch.eye(4, dtype=torch.bool))
    constraint = Constraint(weight, mask)
    other = torch.randn(4, 4, requires_grad=True)
    seen = []
    total = weight + other  # both inputs receive the same gradient tensor
    total.register_hook(seen.append)
    total.backward(torch.ones(4, 4))
    assert torch.equal(other.grad, torch.ones(4, 4))
    assert torch.equal(seen[0], torch.ones(4, 4))
    assert torch.equal(weight.grad, torch.eye(4))
    weight.grad = None
    weight.sum().backward()  # an expanded gradient
    assert torch.equal(weight.grad, torch.eye(4))
    constraint.remove()
