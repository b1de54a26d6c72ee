import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resu.core.quantization import dequantize, pack_codes, quantize, unpack_codes

BITS = pytest.mark.parametrize("bits", [4, 8])
SCHEMES = pytest.mark.parametrize("scheme", ["per_channel", "per_tensor"])


def _restored(w, q):
    rows = w.reshape(w.shape[0], -1) if w.ndim > 1 else w.reshape(1, -1)
    return dequantize(q.codes.reshape(rows.shape), q.scale, q.zero).reshape(w.shape)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 40),
    bits=st.sampled_from([4, 8]),
    scheme=st.sampled_from(["per_channel", "per_tensor"]),
    sparsity=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    centre=st.sampled_from([0.0, 1.0, -1000.0, 1e6]),
    width=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_error_is_at_most_half_a_step(rows, columns, bits, scheme, sparsity, centre, width, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    w = centre + width * torch.randn(rows, columns, generator=generator, dtype=dtype)
    mask = torch.rand(rows, columns, generator=generator) >= sparsity
    q = quantize(w, bits, scheme, mask)
    assert q.codes.dtype == torch.uint8
    assert int(q.codes.max()) < 2**bits
    assert not q.codes[~mask].any()
    error = (_restored(w, q).double() - w.double()).abs()
    rounding = 4 * torch.finfo(dtype).eps * w.abs().amax().double()
    # A float32 scale itself is rounded; over all levels that adds up to a small part of a step.
    bound = q.scale.double().abs().unsqueeze(1) * (0.5 + 2**bits * torch.finfo(dtype).eps) + rounding
    assert (error <= bound)[mask].all()


@BITS
@SCHEMES
def test_range_is_that_of_active_values_only(bits, scheme):
    w = torch.tensor([[0.0, 1.0, 1000.0], [2.0, 3.0, -1000.0]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    q = quantize(w, bits, scheme, mask)
    top = 1.0 if scheme == "per_channel" else 3.0
    torch.testing.assert_close(q.scale, torch.full_like(q.scale, top / (2**bits - 1)))


@BITS
@pytest.mark.parametrize("value", [0.0, -0.75, 0.1, 3e38, 1e-40])
def test_constant_row_is_exact(bits, value):
    w = torch.full((2, 5), value)
    q = quantize(w, bits)
    assert torch.equal(_restored(w, q), w)
    assert torch.isfinite(q.scale).all()
    assert torch.isfinite(q.zero).all()


@BITS
def test_one_active_value_and_empty_rows(bits):
    w = torch.randn(3, 4)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[1, 2] = True
    q = quantize(w, bits, "per_channel", mask)
    assert _restored(w, q)[1, 2] == w[1, 2]
    assert q.scale[0] == q.zero[0] == q.scale[2] == q.zero[2] == 0.0


def test_a_range_wider_than_the_dtype_is_an_error():
    top = torch.finfo(torch.float32).max
    with pytest.raises(ValueError, match="range"):
        quantize(torch.tensor([[-top, 0.0, top]]), 8)


def test_pruned_nan_is_ignored_but_active_nan_is_an_error():
    w = torch.tensor([[1.0, float("nan")], [2.0, 3.0]])
    quantize(w, 4, mask=torch.tensor([[True, False], [True, True]]))
    with pytest.raises(ValueError, match="active weights"):
        quantize(w, 4)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,)])
def test_empty(shape):
    q = quantize(torch.empty(shape), 4)
    assert q.codes.shape == shape


def test_convolution_shape_and_bf16():
    w = torch.randn(4, 3, 2, 2).to(torch.bfloat16)
    q = quantize(w, 8)
    assert q.scale.shape == (4,)
    assert q.scale.dtype == torch.float32
    assert ((_restored(w.float(), q) - w.float()).abs() <= q.scale.view(-1, 1, 1, 1) * 0.51).all()


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 15), max_size=70),
    st.integers(0, 70),
    st.integers(0, 70),
    st.sampled_from([4, 8]),
    st.sampled_from([torch.uint8, torch.float32, torch.float64, torch.bfloat16]),
)
def test_pack_unpack_ranges(values, start, stop, bits, dtype):
    codes = torch.tensor(values, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.numel() == (len(values) if bits == 8 else (len(values) + 1) // 2)
    start, stop = sorted((min(start, len(values)), min(stop, len(values))))
    got = unpack_codes(packed, start, stop, bits, dtype)
    assert got.dtype == dtype
    assert got.tolist() == values[start:stop]


@pytest.mark.parametrize(
    ("bits", "scheme", "text"),
    [(3, "per_channel", "4 or 8"), (True, "per_channel", "4 or 8"), (4, "per_group", "per_tensor")],
)
def test_unknown_options(bits, scheme, text):
    with pytest.raises(ValueError, match=text):
        quantize(torch.ones(2, 2), bits, scheme)


def test_wrong_input():
    with pytest.raises(TypeError, match="floating"):
        quantize(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="mask of shape"):
        quantize(torch.ones(2, 2), mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="uint8"):
        pack_codes(torch.ones(3), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@SCHEMES
def test_the_weight_itself_is_not_touched(dtype, scheme):
    w = torch.randn(5, 7, dtype=dtype)
    before = w.clone()
    quantize(w, 4, scheme)
    quantize(w, 4, scheme, torch.rand(5, 7) > 0.5)
    assert torch.equal(w, before)
