"""What a model returns, whatever it is in, is neither cut nor overlooked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resu.pruning.structured import StructuredPruner, find_structure
from resu.pruning.structured.outputs import difference, output_tensors


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor


@dataclass(slots=True)
class Slotted:
    hidden: Tensor


class Plain:
    def __init__(self, hidden: Tensor) -> None:
        self.hidden, self.itself = hidden, self


class Returns(nn.Module):
    """Two layers; ``what(logits, hidden)`` is returned."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.a, self.between, self.b = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.what = what

    def forward(self, x: Tensor) -> Any:
        hidden = self.between(self.a(x).relu()).relu()
        return self.what(self.b(hidden), hidden)


@pytest.mark.parametrize(
    "what",
    [
        lambda y, h: (y, Answer(y, h)),
        Answer,
        lambda y, h: [y, Slotted(h)],
        lambda y, h: {"y": y, "more": Plain(h)},
        lambda y, h: (y, torch.distributions.Normal(h, 1.0 + h.square(), validate_args=False)),
    ],
)
def test_outputs_in_objects_keep_their_size(what: Any) -> None:
    torch.manual_seed(0)
    model, x = Returns(what), torch.randn(3, 4)
    result = StructuredPruner(0.5, x).prune(model)
    assert result.units == {"a": (8, 4)}
    assert result.fixed["between"] == "an output of the model"
    assert [tuple(out.shape) for out in output_tensors(model(x))][-1] == (3, 8)


def test_what_is_no_output_is_left_out() -> None:
    cache = type("Cache", (), {"__module__": "transformers.cache_utils"})()
    cache.keys = torch.zeros(2)
    found = output_tensors((torch.zeros(1), {torch.zeros(3)}, None, nn.Linear(2, 2), torch, Plain, cache, "text", len))
    assert [x.shape[0] for x in found] == [1, 3]


@pytest.mark.parametrize("value", [-1e4, -1e9])
def test_a_mask_that_is_added_does_not_dwarf_a_difference(value: float) -> None:
    torch.manual_seed(0)

    class Masked(nn.Module):
        def __init__(self, wrong: bool) -> None:
            super().__init__()
            self.a, self.b, self.wrong = nn.Linear(4, 8), nn.Linear(8, 3), wrong

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x).relu()
            out: Tensor = self.b(hidden / hidden.shape[-1] if self.wrong else hidden)
            return out + out.new_tensor([0.0, value, value])

    with pytest.raises(ValueError, match="differ by"):
        StructuredPruner(0.5, torch.randn(3, 4)).prune(Masked(True))
    assert StructuredPruner(0.5, torch.randn(3, 4)).prune(Masked(False)).error < 1e-9


def test_rounding_beside_large_values_is_no_difference() -> None:
    wanted = torch.tensor([1e-17, 3.0, 1e3, 1e5]).double()
    assert difference([wanted], [wanted + torch.tensor([1e-12, -1e-12, 1e-11, 1e-9]).double()], 1e-9)
    assert not difference([wanted], [wanted + torch.tensor([0, 1e-6, 0, 0]).double()], 1e-9)
    assert not difference([wanted], [wanted[:3]], 1e-9)
    assert not difference([wanted], [wanted * float("nan")], 1e-9)


def test_a_table_of_indices_keeps_its_rows() -> None:
    class Looks(nn.Module):
        """Taking rows of the table out would change nothing here, as all name the same entry."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
            self.values = nn.Parameter(torch.randn(9, 2))
            self.register_buffer("where", torch.zeros(5, 7, dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(x).relu()) + self.values[self.where].amax((0, 1))
            return out

    structure = find_structure(Looks(), torch.randn(3, 4))
    assert list(structure.groups) == ["a"]
