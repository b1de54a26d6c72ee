"""Blocks that give their input back, and still are not what a removal would leave; and those that only look so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resu.pruning.structured import BlockPruner, find_blocks


class Turned(torch.autograd.Function):
    """The input, and the gradient with the other sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Block(nn.Module):
    def __init__(self, shortcut: Callable[[Tensor], Any] = lambda x: x, **attributes: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6))
        self.shortcut = shortcut
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.shortcut(x) + self.inner(x)
        return out


def stack(*blocks: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 6), *blocks, nn.Linear(6, 2))


X = torch.linspace(-1, 1, 12).view(4, 3)


@pytest.mark.parametrize("shortcut", [torch.detach, Turned.apply])
def test_blocks_that_do_not_pass_gradients_on_are_refused(shortcut: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(0)
    found = find_blocks(stack(Block(), Block(shortcut), Block()), X)
    assert found.names == ("1", "3")
    assert "it does not pass them on" in found.refused["2"]


def test_gradients_that_are_rounding_only_are_no_hindrance() -> None:
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(6, 2, 8, norm_first=True, batch_first=True) for _ in range(3)]
    assert len(find_blocks(nn.Sequential(*layers), torch.randn(2, 5, 6)).names) == 3  # key biases among them


@pytest.mark.parametrize("name", ["dilation", "kernel_size", "max_rate", "out_channels"])
def test_sizes_that_rise_by_one_are_no_places(name: str) -> None:
    torch.manual_seed(0)
    assert find_blocks(stack(Block(**{name: 1}), Block(**{name: 2})), X).names == ("1", "2")
    assert find_blocks(stack(Block(number=1), Block(number=2)), X).names == ()


def test_a_scale_inside_of_a_block_is_no_block() -> None:
    class Gain(nn.Module):
        """As the global response norm of ConvNeXt V2: what passes through, where it is zero."""

        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.rand(1, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gain * x

    def block() -> Block:
        made = Block()
        made.inner = nn.Sequential(nn.Linear(6, 6), Gain(), nn.Linear(6, 6))
        return made

    torch.manual_seed(0)
    assert find_blocks(stack(block(), block()), X).names == ("1", "2")
    assert find_blocks(stack(block(), block()), X, include="*.inner.1").names == ("1.inner.1", "2.inner.1")
    assert find_blocks(stack(Gain(), block()), X).names == ("1", "2")  # on its own it is one


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler looks at it
def test_compiled_blocks_go_as_a_whole() -> None:
    torch.manual_seed(0)
    compiled = torch.compile(Block(), backend="eager")
    model = stack(compiled, Block(), Block())
    before = model(X).detach()
    assert find_blocks(model, X).names == ("1", "2", "3")
    result = BlockPruner(0.67, X, calibration=[X]).prune(model)
    assert sum(left for _, left in result.units.values()) == 1
    result.undo()
    assert torch.equal(model(X), before)
