"""State of a weight that is born, dies or freezes is zero, whatever the optimizer calls it."""

import pytest
import torch
from torch import nn

from resu.core.optimizer_state import clear_state, state_tensors

NAMES = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {"momentum_buffer"}),
    "adam": (lambda p: torch.optim.Adam(p, amsgrad=True), {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    "adagrad": (lambda p: torch.optim.Adagrad(p), {"sum"}),
    "rmsprop": (
        lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
        {"square_avg", "momentum_buffer", "grad_avg"},
    ),
    "adafactor": (lambda p: torch.optim.Adafactor(p), set()),
}


@pytest.mark.parametrize("as_indices", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_trap_15_every_state_tensor_of_the_weights_shape_is_cleared(name, as_indices):
    make, names = NAMES[name]
    p, other = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4, 6))
    optimizer = make([p, other])
    for _ in range(3):
        p.grad, other.grad = torch.randn(4, 6), torch.randn(4, 6)
        optimizer.step()
    where = torch.rand(4, 6) < 0.5
    before = {k: v.clone() for k, v in state_tensors(optimizer, p).items()}
    others = {k: v.clone() for k, v in state_tensors(optimizer, other).items()}
    assert set(before) == names
    clear_state(optimizer, p, where.view(-1).nonzero().view(-1) if as_indices else where)
    for key, value in state_tensors(optimizer, p).items():
        assert torch.equal(value, before[key].masked_fill(where, 0))
    for key, value in state_tensors(optimizer, other).items():
        assert torch.equal(value, others[key])


def test_a_state_that_is_transposed_in_memory_is_cleared():
    p = nn.Parameter(torch.randn(4, 6))
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    optimizer.state[p]["momentum_buffer"] = torch.ones(6, 4).t()
    clear_state(optimizer, p, torch.tensor([0, 7]))
    assert optimizer.state[p]["momentum_buffer"].reshape(-1).eq(0).nonzero().view(-1).tolist() == [0, 7]


def test_without_state_there_is_nothing_to_clear():
    p = nn.Parameter(torch.randn(2, 2))
    optimizer = torch.optim.Adam([p])
    clear_state(optimizer, p, torch.ones(2, 2, dtype=torch.bool))
    assert len(optimizer.state) == 0
    clear_state(optimizer, nn.Parameter(torch.zeros(3)), torch.ones(3, dtype=torch.bool))
    assert len(optimizer.state) == 0


def test_quantized_state_is_refused_instead_of_spoiled():
    p = nn.Parameter(torch.randn(2, 2))
    optimizer = torch.optim.SGD([p], lr=0.1)
    optimizer.state[p]["state1"] = torch.full((2, 2), 127, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"SGD keeps 'state1' as torch.uint8 codes"):
        clear_state(optimizer, p, torch.ones(2, 2, dtype=torch.bool))
