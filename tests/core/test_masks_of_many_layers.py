"""Masks laid on all layers at once: gradients at the end of a backward pass, weights after a step."""

import copy
import pickle

import pytest
import torch
from torch import nn

from resu.core import enforcement
from resu.core.enforcement import Constraint
from resu.core.mask import SparseMask, apply_all_

SHAPES = [(1, 1), (3, 7), (5, 3, 3, 3), (9,), (600, 1024), (2, 0), (300, 300)]


def mask_of(shape, seed=0):
    return SparseMask(torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3)


def test_many_at_once_are_as_one_by_one():
    pairs, expected = [], []
    for i, dtype in enumerate([torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.complex64]):
        for shape in SHAPES:
            x, mask = (10 * torch.randn(shape)).to(dtype), mask_of(shape, i)
            pairs.append((mask, x))
            expected.append(mask.apply_(x.clone()))
    x = torch.randn(4, 6).t()  # not contiguous
    pairs.append((mask_of((6, 4)), x))
    expected.append(pairs[-1][0].apply_(x.clone()))
    for _ in range(2):  # the second time with what small masks have remembered
        versions = [x._version for _, x in pairs]
        apply_all_(pairs)
        assert all(torch.equal(x, y) for (_, x), y in zip(pairs, expected, strict=True))
        assert all(x._version > before for (_, x), before in zip(pairs, versions, strict=True))


def test_nan_infinity_and_minus_zero_become_zero():
    x = torch.tensor([[float("nan"), float("inf"), -0.0, -1.0, 5.0]])
    apply_all_([(SparseMask(torch.tensor([[False, False, False, False, True]])), x)])
    assert x.tolist() == [[0.0, 0.0, 0.0, 0.0, 5.0]]
    assert not torch.signbit(x).any()


def test_input_a_tensor_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"\(2, 3\) used on a tensor of shape \(3, 2\)"):
        apply_all_([(mask_of((2, 3)), torch.zeros(3, 2))])


def test_what_a_small_mask_remembers_is_counted_and_not_copied():
    small, large = mask_of((64, 80)), mask_of((512, 512))
    bits = small.nbytes, large.nbytes
    apply_all_([(small, torch.ones(64, 80)), (large, torch.ones(512, 512))])
    assert small.nbytes == bits[0] + 64 * 80
    assert large.nbytes == bits[1]
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), small.to("cpu")):
        assert other == small
        assert other.nbytes == bits[0]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape", SHAPES)
def test_pruned_positions_are_taken_out(shape, dtype, threads):
    x, mask = (10 * torch.randn(shape)).to(dtype), mask_of(shape)
    zero, before = torch.zeros((), dtype=dtype), torch.get_num_threads()
    expected, former = torch.where(mask.mask, zero, x), x.clone()
    torch.set_num_threads(threads)  # from three on torch works on large masks
    try:
        assert torch.equal(mask.take_pruned_(x), expected)
        assert torch.equal(x, torch.where(mask.mask, former, zero))
        assert torch.equal(mask.restore_(torch.zeros_like(x), former), x)
        assert torch.equal(mask.zero_(former, active=True), expected)
    finally:
        torch.set_num_threads(before)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)
        self.masks = {name: mask_of(getattr(self, name).weight.shape, i) for i, name in enumerate(("first", "second"))}
        self.held = [Constraint(getattr(self, name).weight, mask) for name, mask in self.masks.items()]

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))).square().sum()

    def masked(self):
        grads = {name: getattr(self, name).weight.grad for name in self.masks}
        return [not g[~self.masks[name].mask].any() and bool(g.any()) for name, g in grads.items()]


def test_all_gradients_are_masked_when_the_backward_pass_returns():
    net = Net()
    for _ in range(2):  # the second is accumulated on the first
        net(torch.randn(5, 6)).backward()
        assert net.masked() == [True, True]
    assert not enforcement._waiting


def test_another_hook_sees_the_masked_gradient():
    net, seen = Net(), []
    net.second.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    net(torch.randn(5, 6)).backward()
    assert not seen[0][~net.masks["second"].mask].any()
    assert seen[0].any()


def test_a_step_within_the_backward_pass_gets_the_masked_gradient():
    net = Net()
    for held in net.held:
        held.enforce()
    optimizer = torch.optim.SGD([net.first.weight, net.second.weight], lr=0.1, momentum=0.9)
    # The bias of the first layer comes after the weight of the second.
    net.first.bias.register_post_accumulate_grad_hook(lambda p: optimizer.step())
    net(torch.randn(5, 6)).backward()
    for name, mask in net.masks.items():
        weight = getattr(net, name).weight
        assert not weight.detach()[~mask.mask].any()
        if weight in optimizer.state:
            assert not optimizer.state[weight]["momentum_buffer"][~mask.mask].any()
    assert optimizer.state[net.second.weight]["momentum_buffer"].any()
    assert net.masked() == [True, True]


def test_after_a_backward_pass_that_failed_no_unmasked_gradient_reaches_a_step():
    net = Net()
    x = torch.randn(5, 6, requires_grad=True)

    def fail(grad):
        raise RuntimeError("no")

    x.register_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        net(x).backward()
    optimizer = torch.optim.SGD([net.first.weight, net.second.weight], lr=0.1, momentum=0.9)
    optimizer.step()
    assert not optimizer.state[net.second.weight]["momentum_buffer"][~net.masks["second"].mask].any()
    assert not enforcement._waiting
    net.zero_grad()
    net(torch.randn(5, 6)).backward()
    assert net.masked() == [True, True]


def test_only_the_weights_of_the_backward_pass_are_touched():
    net = Net()
    net.first.weight.grad = torch.ones(8, 6)
    net.second(torch.randn(3, 8)).square().sum().backward()
    assert torch.equal(net.first.weight.grad, torch.ones(8, 6))
    assert net.masked()[1]


def test_a_step_that_took_pruned_values_out_is_not_trusted_blindly():
    net = Net()
    held, mask = net.held[0], net.masks["first"]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def late(*_):
        taken.append(held.take_pruned())
        if len(taken) == 2:
            with torch.no_grad():
                net.first.weight.add_(1.0)  # after it, before the step has ended

    taken = []
    optimizer.register_step_post_hook(late)
    for _ in range(2):
        net.zero_grad()
        net(torch.randn(5, 6)).backward()
        optimizer.step()
        assert not net.first.weight.detach()[~mask.mask].any()
    assert taken[0].any()
    assert not taken[1].any()
