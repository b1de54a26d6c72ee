"""What only training does is seen too, where the model runs there on the example inputs."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from resu.pruning.snapshots import random_state
from resu.pruning.structured import StructuredPruner
from resu.pruning.structured.training import differs_in_training


class InTraining(nn.Module):
    """Two layers, and a head beside them that only training runs."""

    def __init__(self, branch: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.aux = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(8, 2)
        self.branch = branch

    def forward(self, x: Tensor) -> Any:
        first = self.a(x).relu()
        out = self.c(self.b(first).relu())
        return (out, self.branch(self, first)) if self.training else out


@pytest.mark.parametrize(
    ("branch", "why"),
    [
        (lambda m, h: m.aux(h), "in training it does not run: .*take it out if the model is not to be trained"),
        (lambda m, h: h[:, :4].mean(1), "in training its outputs differ"),
        (lambda m, h: h, "in training its outputs are"),
        (lambda m, h: (h, torch.rand(1)), "in training its outputs are"),
    ],
)
def test_branches_of_training_are_seen(branch: Callable[[Any, Tensor], Any], why: str) -> None:
    torch.manual_seed(0)
    model, x = InTraining(branch), torch.randn(3, 4)
    result = StructuredPruner(0.5, x).prune(model)
    assert result.units == {"b": (8, 4)}
    assert "in training" in result.refused["a"]
    with pytest.raises(ValueError, match=why):
        StructuredPruner(0.5, x, include="a").prune(model)
    model.train()(x)


@pytest.mark.parametrize(
    "branch",
    [
        lambda m, h: nn.functional.dropout(h, 0.5).mean(),
        lambda m, h: h.mean() if random.random() < 0.5 else h.sum(),
        lambda m, h: h.mean() * float(np.random.rand()),
        lambda m, h: m.of_the_targets,
        lambda m, h: h.sum() * float("nan"),
    ],
)
def test_what_cannot_be_compared_in_training_is_no_hindrance(branch: Callable[[Any, Tensor], Any]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    model, before = InTraining(branch), random_state()
    assert StructuredPruner(0.5, x).prune(model).units == {"a": (8, 4), "b": (8, 4)}
    assert random_state() == before


def test_dropout_and_batch_norm_agree_in_training() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 2)]
    model = nn.Sequential(*layers)
    assert StructuredPruner(0.5, torch.randn(5, 4)).prune(model).units == {"0": (8, 4)}
    assert StructuredPruner(0.5, torch.randn(1, 4)).prune(model).units == {"0": (4, 2)}  # training wants more values
    assert model[2].p == 0.5
    whole = nn.Sequential(*layers).double()
    other = nn.Sequential(nn.Linear(4, 4), *layers[1:]).double()
    assert "does not run" not in differs_in_training(whole, whole, torch.randn(5, 4).double(), 1e-9)
    assert "in training" in differs_in_training(whole, other, torch.randn(5, 4).double(), 1e-9)
