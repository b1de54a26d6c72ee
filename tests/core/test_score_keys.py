"""Keys order as the numbers do, in every dtype and across dtypes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resu.core.score_keys import FINITE, INFINITE, has_keys, narrow, score_keys, wide_keys

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_have_the_order_of_the_numbers(dtype):
    values = torch.cat([torch.randn(2000, dtype=torch.float64), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e4, -3e4])])
    x = values.to(dtype)
    keys, wide = score_keys(x), wide_keys(score_keys(x), dtype)
    order = np.argsort(x.double().numpy(), kind="stable")
    assert (np.diff(keys[order].astype(np.int64)) >= 0).all()
    assert ((np.diff(keys[order].astype(np.int64)) == 0) == (np.diff(x.double().numpy()[order]) == 0)).all()
    assert np.array_equal(wide, score_keys(x.double()))
    positive = x.double().numpy() >= 0
    assert np.array_equal(wide[positive], np.abs(x.double().numpy()[positive]).view(np.int64))  # IEEE 754 bits


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=200)
@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_narrow_is_the_nearest_number_below_and_above(dtype, value):
    key = int(score_keys(torch.tensor([value], dtype=torch.float64))[0])
    low, high = narrow(key, dtype), narrow(key, dtype, up=True)
    kind = {2: np.int16, 4: np.int32, 8: np.int64}[dtype.itemsize]
    below, above = (int(wide_keys(np.array([k], dtype=kind), dtype)[0]) for k in (low, high))
    assert below <= key <= above
    assert high - low == (below != key)
    assert abs(low) <= INFINITE[dtype]
    assert abs(key) <= FINITE


def test_only_floats_of_two_bytes_and_more_have_keys():
    assert [has_keys(d) for d in DTYPES] == [True] * 4
    assert not has_keys(torch.float8_e4m3fn)
    assert not has_keys(torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_numbers_of_sixteen_bits(dtype):
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    finite = every[every.isfinite()]
    keys = score_keys(finite)
    assert np.abs(keys.astype(int)).max() < INFINITE[dtype]
    assert torch.equal(finite[np.argsort(keys, kind="stable")].double(), finite.double().sort(stable=True).values)
    odd = score_keys(every[~every.isfinite()])
    assert (np.abs(odd.astype(int)) >= INFINITE[dtype]).all()
    for key, wide in zip(keys[::97].tolist(), wide_keys(keys[::97], dtype).tolist(), strict=True):
        assert narrow(wide, dtype) == narrow(wide, dtype, up=True) == key
