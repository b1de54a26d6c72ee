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


BOOK = torch.tensor([-1.0, -0.25, 0.5, 0.0, 1.0])  # zero is neither first nor in the middle


@pytest.mark.parametrize("as_indices", [False, True])
def test_eight_bit_codes_beside_their_book_are_set_to_zero(as_indices):
    """As bitsandbytes keeps them: state1 with qmap1, state2 with qmap2."""
    p = nn.Parameter(torch.randn(2, 3))
    optimizer = torch.optim.SGD([p], lr=0.1)
    codes = torch.tensor([[0, 1, 2], [4, 0, 2]], dtype=torch.uint8)
    optimizer.state[p] = {
        "step": 5,
        "state1": codes.clone(),
        "qmap1": BOOK,
        "absmax1": torch.ones(1),
        "state2": codes.clone(),
        "qmap2": BOOK.flip(0),
        "absmax2": torch.ones(1),
    }
    where = torch.tensor([[True, False, True], [False, True, False]])
    clear_state(optimizer, p, where.view(-1).nonzero().view(-1) if as_indices else where)
    for key, zero in (("1", 3), ("2", 1)):
        assert torch.equal(optimizer.state[p]["state" + key], codes.masked_fill(where, zero))
        assert not optimizer.state[p]["qmap" + key][optimizer.state[p]["state" + key].long()][where].any()
        assert optimizer.state[p]["absmax" + key].item() == 1
    assert optimizer.state[p]["step"] == 5


class Coded(torch.Tensor):
    """As torchao keeps them: a tensor that holds codes and their book."""

    @staticmethod
    def __new__(cls, codes, book=None):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, book=None):
        self.codes = codes
        if book is not None:
            self.qmap = book

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{func} on coded state")


@pytest.mark.parametrize("as_indices", [False, True])
def test_tensors_of_codes_are_set_to_zero(as_indices):
    p = nn.Parameter(torch.randn(2, 3))
    optimizer = torch.optim.SGD([p], lr=0.1)
    codes = torch.tensor([[0, 1, 2], [4, 0, 2]], dtype=torch.uint8)
    eights = torch.tensor([[1.0, -2.0, 0.5], [4.0, 0.25, -1.0]]).to(torch.float8_e4m3fn)
    optimizer.state[p] = {"exp_avg": Coded(codes.clone(), BOOK), "exp_avg_sq": Coded(eights.clone())}
    where = torch.tensor([[True, False, True], [False, True, False]])
    clear_state(optimizer, p, where.view(-1).nonzero().view(-1) if as_indices else where)
    assert torch.equal(optimizer.state[p]["exp_avg"].codes, codes.masked_fill(where, 3))
    assert torch.equal(optimizer.state[p]["exp_avg_sq"].codes.float(), eights.float().masked_fill(where, 0))


def test_two_codes_in_a_byte_are_refused():
    p = nn.Parameter(torch.randn(2, 4))
    optimizer = torch.optim.SGD([p], lr=0.1)

    class Packed(Coded):
        @staticmethod
        def __new__(cls, codes, book=None):
            return torch.Tensor._make_wrapper_subclass(cls, (2, 4), dtype=torch.float32)

    optimizer.state[p]["exp_avg"] = Packed(torch.zeros(4, dtype=torch.uint8), BOOK)
    with pytest.raises(TypeError, match="cannot be set to zero"):
        clear_state(optimizer, p, torch.ones(2, 4, dtype=torch.bool))
