"""The validator looks at every pruned position."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from resu.core.mask import SparseMask
from resu.pruning.sparse_lora import get_lora_layers, validate_sparsity_preserved
from tests.pruning.lora_models import adapted


@pytest.mark.parametrize("value", [1e-5, -3.0, math.nan, math.inf])
def test_one_among_ten_million(value):
    n = 3200
    layer = nn.Linear(n, n, bias=False)
    mask = torch.rand(n, n, generator=torch.Generator().manual_seed(0)) > 0.5
    layer.weight.data.masked_fill_(~mask, 0)
    masks = {"weight": SparseMask(mask)}
    assert validate_sparsity_preserved(layer, masks)[0]
    planted = (~mask).nonzero()[1234567]
    layer.weight.data[tuple(planted)] = value
    ok, report = validate_sparsity_preserved(layer, masks)
    assert not ok
    assert report["global"]["total_violations"] == report["per_layer"]["weight"]["violations"] == 1
    assert report["global"]["violation_rate"] == 1 / int((~mask).sum())
    assert report["per_layer"]["weight"]["max_abs"] == pytest.approx(abs(value), nan_ok=True)


def test_tolerance_hides_nothing():
    layer = nn.Linear(3, 1, bias=False)
    layer.weight.data.copy_(torch.tensor([[1e-7, -1e-5, -0.0]]))
    masks = {"weight": torch.zeros(1, 3, dtype=torch.bool)}
    ok, report = validate_sparsity_preserved(layer, masks)
    assert not ok
    assert (report["global"]["total_violations"], report["global"]["nonzero"]) == (1, 2)
    assert validate_sparsity_preserved(layer, masks, 1e-4)[0]
    assert validate_sparsity_preserved(layer, masks, 1e-4)[1]["global"]["nonzero"] == 2
    assert validate_sparsity_preserved(layer, masks, 0)[1]["global"]["total_violations"] == 2
    for wrong in (-1, math.nan):
        with pytest.raises(ValueError, match="tolerance"):
            validate_sparsity_preserved(layer, masks, wrong)


@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(0, 9))
def test_counts_are_exact_for_any_shape(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Module()
    values = torch.randint(-1, 2, shape, generator=generator).float()
    mask = torch.rand(shape, generator=generator) > 0.5
    model.w = nn.Parameter(values)
    _, report = validate_sparsity_preserved(model, {"w": mask}, 0)
    assert report["global"]["total_violations"] == int((values[~mask] != 0).sum())
    assert report["per_layer"]["w"]["n_pruned"] == int((~mask).sum())


def test_a_packed_base_is_compared_by_its_bits():
    model, masks = adapted(base_bits=4)
    assert validate_sparsity_preserved(model, masks)[0]
    name, layer = list(get_lora_layers(model).items())[2]  # Conv1D, whose bits are those of the transpose
    tighter = masks[name].clone()
    kept = tighter.nonzero()[5]
    tighter[tuple(kept)] = False
    ok, report = validate_sparsity_preserved(model, masks | {name: tighter})
    assert not ok
    assert report["per_layer"][name]["violations"] == 1
    layer.merge()
    assert validate_sparsity_preserved(model, masks, 0)[0]


def test_names_and_shapes_that_do_not_fit():
    layer = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="no parameter 'fc'; it has: weight, bias"):
        validate_sparsity_preserved(layer, {"fc": torch.ones(2, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"shape \(3, 2\), the parameter \(2, 3\)"):
        validate_sparsity_preserved(layer, {"weight": torch.ones(3, 2, dtype=torch.bool)})
    with pytest.raises(TypeError, match="bool"):
        validate_sparsity_preserved(layer, {"weight": torch.ones(2, 3)})
    ok, report = validate_sparsity_preserved(layer, {})
    assert ok
    assert report["global"]["violation_rate"] == 0.0
