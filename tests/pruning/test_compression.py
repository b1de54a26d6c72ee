"""Bytes are those that the formats really store, tensor by tensor."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resu.core.mask import SparseMask
from resu.core.pattern import NM
from resu.formats.bitmask import pack_bitmask
from resu.modules.convert import convert_to_resu
from resu.pruning.compression import LAYOUTS, CompressionStats, layout_bytes

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=4)


def _mask(shape, percent):
    return SparseMask.random(shape, percent / 100, torch.Generator().manual_seed(0))


@settings(max_examples=60)
@given(SHAPES, st.integers(0, 99), st.sampled_from(DTYPES))
def test_bitmask_is_what_the_format_writes(shape, percent, dtype):
    mask = _mask(shape, percent)
    parts = pack_bitmask(torch.zeros(shape, dtype=dtype), mask)
    assert layout_bytes(mask, dtype)["bitmask"] == sum(part.nbytes for part in parts.values())


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99), st.sampled_from([torch.float32, torch.float64]))
def test_csr_is_what_torch_holds_with_int32_indices(rows, columns, percent, dtype):
    mask = _mask([rows, columns], percent)
    csr = mask.apply(torch.ones(rows, columns, dtype=dtype)).to_sparse_csr()
    parts = [csr.values(), csr.col_indices().int(), csr.crow_indices().int()]
    assert layout_bytes(mask, dtype)["csr"] == sum(part.nbytes for part in parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_int4_with_bitmask_is_what_a_layer_in_qresu_mode_holds(dtype):
    model = convert_to_resu(nn.Sequential(nn.Linear(21, 13, bias=False, dtype=dtype)))
    model[0].prune_by_magnitude(0.63)
    expected = layout_bytes(model[0].mask, dtype)["int4+bitmask"]
    model[0].enter_qresu_mode(bits=4)
    state = model[0].state_dict()
    assert expected == sum(state[part].nbytes for part in ("codes", "bitmask", "scale", "zero"))


def test_two_of_four_only_where_it_is_legal():
    scores = torch.rand(6, 16)
    mask = NM(2, 4).mask(scores, 0.5)
    sizes = layout_bytes(mask, torch.bfloat16)
    assert sizes["2:4"] == 6 * 8 * 2 + 6 * 2 + 16  # compressed [R, C/2], bitmask [R, C/8], shape int64[2, 1]
    wrong = mask.clone()
    wrong[0, :4] = torch.tensor([True, True, True, False])
    assert layout_bytes(wrong)["2:4"] is None
    fewer = mask.clone()
    fewer[0, :4] = torch.tensor([True, False, False, False])  # legal for the hardware, but not [R, C/2] values
    assert layout_bytes(fewer)["2:4"] is None
    assert layout_bytes(NM(2, 4).mask(torch.rand(6, 18), 0.5))["2:4"] is None
    assert layout_bytes(NM(2, 4).mask(torch.rand(6, 16, 3, 3), 0.5))["2:4"] is None


@given(st.integers(1, 5), st.integers(1, 40))
def test_pack_quantized_words(rows, columns):
    sizes = layout_bytes(torch.ones(rows, columns, dtype=torch.bool), torch.bfloat16)
    packed = torch.zeros(rows, math.ceil(columns * 4 / 32), dtype=torch.int32)
    scale, shape = torch.zeros(rows, 1, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64)
    assert sizes["int4"] == packed.nbytes + scale.nbytes + shape.nbytes
    assert (sizes["dense"], sizes["bf16"]) == (2 * rows * columns, 2 * rows * columns)


def test_bytes_per_weight_of_formats_from_bf16_at_half():
    """The figures a large layer tends to: dense 2, bitmask 1.125, int4 0.5, int4 of kept values with bits 0.375."""
    sizes = layout_bytes(_mask([512, 4096], 50), torch.bfloat16)
    each = {layout: size / (512 * 4096) for layout, size in sizes.items() if size is not None}
    assert each["dense"] == 2.0
    assert each["bitmask"] == pytest.approx(1.125, abs=0.01)
    assert each["int4"] == pytest.approx(0.5, abs=0.01)
    assert each["int4+bitmask"] == pytest.approx(0.375, abs=0.01)


def test_totals_count_each_tensor_once_and_never_claim_one_over_density():
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64))
    model[2].weight = model[0].weight
    stats = CompressionStats.of({"0.weight": _mask([64, 64], 90)}, model)
    held = {id(x): x.nbytes for x in [*model.parameters(), *model.buffers()]}
    assert stats.total("dense") == sum(held.values())
    assert (stats.kept, stats.numel) == (410, 4096)
    assert stats.sparsity == pytest.approx(3686 / 4096)
    assert stats.model_sparsity < stats.sparsity
    assert all(stats.ratio(layout) < 10 for layout in ("bitmask", "csr"))
    assert stats.ratio("csr") < 5.1  # 4 + 4 bytes per kept weight
    assert stats.ratio("bitmask", against="bf16") == stats.total("bf16") / stats.total("bitmask")
    assert stats.ratio("2:4") is None


def test_low_sparsity_makes_csr_larger_than_dense_and_says_so():
    stats = CompressionStats.of({"w": _mask([64, 64], 30)})
    assert stats.ratio("csr") < 1


def test_print_and_json():
    stats = CompressionStats.of({"0.weight": _mask([8, 16], 50)}, nn.Sequential(nn.Linear(16, 8)))
    text = str(stats)
    for word in ("layer", "0.weight", "pruned weights", "everything else", "whole model", "times smaller", *LAYOUTS):
        assert word in text
    body = stats.to_dict()
    assert body["bytes"]["dense"] == 512
    assert body["layers"][0]["shape"] == [8, 16]
    import json

    assert json.loads(json.dumps(body)) == body


def test_errors():
    with pytest.raises(ValueError, match="unknown layout 'coo'; known: dense"):
        CompressionStats.of({}).bytes("coo")
    with pytest.raises(ValueError, match="no parameter 'w'"):
        CompressionStats.of({"w": _mask([2, 2], 50)}, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        CompressionStats.of({"weight": _mask([2, 3], 50)}, nn.Linear(2, 2))
    with pytest.raises(TypeError, match="bool"):
        layout_bytes(torch.ones(2, 2))
