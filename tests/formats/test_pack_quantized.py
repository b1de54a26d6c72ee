"""Symmetric 4-bit weights: against a plain restatement in float64, every code, zeros exact, damaged parts named."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from resu import SparseMask
from resu.core.io import FileFormatError
from resu.core.mask_files import write_masks
from resu.formats.inspect import describe
from resu.formats.pack_quantized import (
    pack_int4,
    pack_quantized,
    quantization_config,
    quantized_parts,
    quantized_prefixes,
    unpack_int4,
    unpack_quantized,
)
from resu.formats.stored import Stored

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def decoded(parts):
    """Codes and exact values, one number after the other, from the sentences of the format."""
    rows, columns = parts["weight_shape"].tolist()
    words, scale = parts["weight_packed"].tolist(), parts["weight_scale"].double().tolist()
    groups = parts["weight_scale"].shape[1]
    codes = [[((words[r][c // 8] >> (4 * (c % 8))) & 15) - 8 for c in range(columns)] for r in range(rows)]
    values = [[codes[r][c] * scale[r][c * groups // columns] for c in range(columns)] for r in range(rows)]
    return np.array(codes).reshape(rows, columns), torch.tensor(values, dtype=torch.float64).view(rows, columns)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 6),
    groups=st.integers(1, 4),
    size=st.integers(1, 19),
    dtype=st.sampled_from(DTYPES),
    power=st.integers(-30, 12),
    seed=st.integers(0, 2**31),
)
def test_every_weight_comes_back_within_half_a_step_and_zeros_exactly(rows, groups, size, dtype, power, seed):
    generator = torch.Generator().manual_seed(seed)
    power = max(power, -12) if dtype == torch.float16 else power
    weight = (torch.randn(rows, groups * size, generator=generator) * 2.0**power).to(dtype)
    weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0
    for group_size in (None, size):
        parts = pack_quantized(weight, group_size)
        assert {n: (p.dtype, tuple(p.shape)) for n, p in parts.items()} == quantized_parts(
            dtype, tuple(weight.shape), group_size
        )
        codes, values = decoded(parts)
        step = parts["weight_scale"].double().repeat_interleave(weight.shape[1] // parts["weight_scale"].shape[1], 1)
        assert ((values - weight.double()).abs() <= step / 2 * (1 + 1e-12)).all()
        assert (values[weight == 0] == 0).all()
        # The formula: nearest code, of two equally near ones the even, within -8 and 7.
        expected = np.clip(np.rint((weight.double() / step).numpy()), -8, 7)
        assert np.array_equal(codes, expected)
        back = unpack_quantized(parts)
        assert back.dtype == dtype
        assert torch.equal(back, values.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_scale_is_the_largest_weight_over_7_5_rounded_up(dtype):
    weight = torch.randn(200, 16).to(dtype)
    scale = pack_quantized(weight)["weight_scale"].double()
    exact = weight.double().abs().amax(1, keepdim=True) / 7.5
    unit = torch.finfo(dtype).eps
    assert (scale >= exact * (1 - 1e-15)).all()
    assert (scale <= exact * (1 + unit) + 1e-12).all()


def test_all_codes_and_their_places():
    codes = torch.arange(-8, 8, dtype=torch.int8).view(1, 16)
    packed = pack_int4(codes)
    assert packed.view(torch.uint8).tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]
    assert torch.equal(unpack_int4(packed, 16), codes)
    assert pack_int4(codes[:, :3]).tolist() == [[0x210]]  # padded with zero bits, not with code 0
    assert torch.equal(unpack_int4(pack_int4(codes[:, :3]), 3), codes[:, :3])


def test_rows_of_zeros_of_minus_zeros_and_of_the_smallest_numbers():
    weight = torch.tensor([[0.0, 0.0], [-0.0, 0.0], [1e-45, -1e-45], [3.4e38, -3.4e38]])
    parts = pack_quantized(weight)
    assert parts["weight_scale"][:2].tolist() == [[1.0], [1.0]]
    back = unpack_quantized(parts)
    assert not torch.signbit(back[:2]).any()
    assert torch.equal(back[:3], weight[:3])
    assert torch.isfinite(back).all()
    largest = torch.full((1, 2), 65504.0, dtype=torch.float16)
    assert torch.isfinite(unpack_quantized(pack_quantized(largest))).all()


@pytest.mark.parametrize(
    ("weight", "group_size", "says"),
    [
        (torch.ones(4), None, r"matrices that have columns, got shape \(4,\)"),
        (torch.ones(4, 0), None, "columns"),
        (torch.ones(2, 2, 2), None, "matrices"),
        (torch.ones(2, 2, dtype=torch.int8), None, "torch.int8; leave it dense"),
        (torch.tensor([[1.0, float("nan")]]), None, "1 NaN or infinite"),
        (torch.tensor([[1.0, float("-inf")]]), None, "1 NaN or infinite"),
        (torch.ones(2, 6), 4, "group_size 4 does not divide 6 columns"),
        (torch.ones(2, 6), 0, "positive integer, or None"),
        (torch.ones(2, 6), True, "positive integer, or None"),
        (torch.ones(2, 6), 2.0, "positive integer, or None"),
    ],
)
def test_what_cannot_be_packed(weight, group_size, says):
    with pytest.raises(ValueError, match=says):
        pack_quantized(weight, group_size)


def test_parts_that_do_not_fit_together():
    good = pack_quantized(torch.randn(4, 20))
    for change, says in [
        ({"weight_packed": good["weight_packed"][:, :2]}, "needs packed 4-bit codes"),
        ({"weight_packed": good["weight_packed"].long()}, "int64"),
        ({"weight_shape": torch.tensor([4, 40])}, "needs packed 4-bit codes"),  # 8 bits, for instance
        ({"weight_shape": torch.tensor([4])}, "damaged"),
        ({"weight_shape": torch.tensor([4, 0])}, "needs packed"),
        ({"weight_scale": good["weight_scale"][:2]}, "scales"),
        ({"weight_scale": torch.ones(4, 3)}, "scales"),
        ({"weight_scale": torch.ones(4, 0)}, "no scales"),
        ({"weight_scale": good["weight_scale"].to(torch.int8)}, "scales torch.int8"),
    ]:
        with pytest.raises(FileFormatError, match=says) as caught:
            unpack_quantized({**good, **change}, "fc.weight")
        assert "'fc.weight'" in str(caught.value)
    with pytest.raises(FileFormatError, match="weight_scale"):
        unpack_quantized({n: p for n, p in good.items() if n != "weight_scale"})


def test_the_config_is_that_of_the_format():
    block = quantization_config(["lm_head"])
    assert block == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"},
            }
        },
    }
    grouped = quantization_config([], 128)["config_groups"]["group_0"]["weights"]
    assert grouped == {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}


@pytest.fixture
def folder(tmp_path):
    """Two packed layers and a bias as some library has written them, with a mask file beside."""
    weights = {"a.weight": torch.randn(6, 12), "b.weight": torch.randn(3, 7).bfloat16()}
    state = {"a.bias": torch.ones(6)}
    for name, weight in weights.items():
        weight[:, ::2] = 0
        state |= {name.removesuffix("weight") + part: value for part, value in pack_quantized(weight).items()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization_config([])}))
    write_masks({"a.weight": SparseMask(weights["a.weight"] != 0)}, tmp_path / "masks.safetensors")
    return tmp_path


def test_a_folder_reads_as_its_weights(folder):
    stored = Stored.open(folder)
    assert sorted(stored.names) == ["a.bias", "a.weight", "b.weight"]
    assert stored.shape("b.weight") == (3, 7)
    assert stored.dtype("b.weight") == torch.bfloat16
    assert stored.layout("a.weight") == "pack-quantized"
    assert stored.nbytes("a.weight") == 6 * 2 * 4 + 6 * 4 + 16
    raw = load_file(folder / "model.safetensors")
    weight, mask = stored.read("a.weight")
    assert mask is None
    assert torch.equal(
        weight, unpack_quantized({p: raw[f"a.{p}"] for p in quantized_parts(weight.dtype, (6, 12), None)})
    )
    rows = {row["name"]: row for row in describe(folder)["tensors"]}
    assert rows["a.weight"]["sparsity"] == 0.5
    assert rows["a.weight"]["layout"] == "pack-quantized"


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"a.weight": torch.ones(6, 12)}, "'a.weight' both in the layout pack-quantized and in another"),
        ({"a.weight_zero_point": torch.ones(6, 1)}, "'a.weight_zero_point': of pack-quantized, only symmetric"),
        ({"b.weight_g_idx": torch.ones(7)}, "'b.weight_g_idx'"),
    ],
)
def test_what_is_not_read_is_refused(folder, extra, says):
    save_file({**load_file(folder / "model.safetensors"), **extra}, folder / "model.safetensors")
    with pytest.raises(FileFormatError, match=re.escape(says)):
        Stored.open(folder)


def test_prefixes():
    names = ["x.weight_packed", "x.weight_scale", "x.weight_shape", "y.weight_packed", "weight_packed", "weight_scale"]
    assert quantized_prefixes(names) == ["x."]
