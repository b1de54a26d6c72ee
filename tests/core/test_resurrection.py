import pytest
import torch

from resu.core.mask import SparseMask
from resu.core.quantization import dequantize, pack_codes, quantize
from resu.core.resurrection import (
    PackedRows,
    active_checksum,
    gather_active,
    gather_theta,
    init_theta,
    row_offsets,
    scatter_theta_,
    sigma_active,
)

SHAPES = [(7, 13), (16, 64), (5, 3, 3, 3), (4, 2, 5), (11,), (600, 1024)]


def _masked(shape, sparsity=0.6, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, dtype=dtype, generator=generator)
    return w, SparseMask.random(shape, sparsity, generator=generator)


def _packed(w, mask, bits, scheme="per_channel"):
    q = quantize(w, bits, scheme, mask.mask)
    codes = pack_codes(gather_active(q.codes, mask), bits)
    rows = mask.packed.shape[0]
    packed = PackedRows(codes, mask.packed, q.scale, q.zero, row_offsets(mask), w.numel() // rows, bits)
    dense = dequantize(q.codes.view(rows, -1), q.scale, q.zero).view(w.shape)
    return packed, dense


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scatter_and_gather_are_inverse_and_elementwise_right(shape, dtype):
    w, mask = _masked(shape, dtype=dtype)
    flat = mask.mask.view(-1)
    assert torch.equal(gather_theta(w, mask), w.view(-1)[~flat])
    assert torch.equal(gather_active(w, mask), w.view(-1)[flat])
    theta = torch.arange(mask.n_pruned, dtype=torch.float64).to(dtype)
    expected = w.clone().view(-1)
    expected[~flat] = theta
    got = scatter_theta_(w.clone(), theta, mask)
    assert torch.equal(got, expected.view(shape))
    assert torch.equal(gather_theta(got, mask), theta)


def test_scatter_into_a_tensor_that_is_not_contiguous():
    w, mask = _masked((8, 4, 3, 3))
    strided = w.contiguous(memory_format=torch.channels_last)
    theta = torch.randn(mask.n_pruned)
    assert torch.equal(scatter_theta_(strided, theta, mask), scatter_theta_(w, theta, mask))


def test_theta_of_the_wrong_length():
    w, mask = _masked((4, 4))
    with pytest.raises(ValueError, match="pruned positions"):
        scatter_theta_(w, torch.zeros(3), mask)
    with pytest.raises(ValueError, match="shape"):
        gather_theta(torch.zeros(3, 4), mask)


def test_start_values_have_the_documented_spread():
    w, mask = _masked((200, 500))
    active = w.view(-1)[mask.active_indices].double()
    sigma = sigma_active(w, mask)
    assert sigma == pytest.approx(float(active.std(correction=0)), rel=1e-12)
    theta = init_theta(mask, sigma, 0.1, generator=torch.Generator().manual_seed(0))
    assert theta.shape == (mask.n_pruned,)
    assert float(theta.std()) == pytest.approx(0.1 * sigma, rel=0.02)
    assert float(theta.mean()) == pytest.approx(0.0, abs=0.002)


def test_start_values_without_active_weights_are_zero():
    w = torch.randn(3, 3)
    mask = SparseMask(torch.zeros(3, 3, dtype=torch.bool))
    assert not init_theta(mask, sigma_active(w, mask), 0.5).any()


@pytest.mark.parametrize("epsilon", [-0.1, float("nan"), float("inf"), "0.1", True])
def test_epsilon_is_checked(epsilon):
    mask = SparseMask(torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises((TypeError, ValueError), match="epsilon"):
        init_theta(mask, 1.0, epsilon)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scheme", ["per_channel", "per_tensor"])
def test_assembled_rows_equal_the_dense_formula(shape, bits, scheme):
    w, mask = _masked(shape)
    packed, dense = _packed(w, mask, bits, scheme)
    theta = torch.randn(mask.n_pruned)
    expected = scatter_theta_(dense, theta, mask).view(mask.packed.shape[0], -1)
    rows = expected.shape[0]
    for r0, r1 in {(0, rows), (0, 1), (rows - 1, rows), (rows // 3, rows // 2 + 1)}:
        holes = []
        out = torch.full((r1 - r0, packed.columns), float("nan"))
        assert torch.equal(packed.assemble(theta, r0, r1, out, holes), expected[r0:r1])
        again = []
        packed.holes(r0, r1, again)
        assert [h[:2] for h in holes] == [h[:2] for h in again]
        collected = torch.full_like(theta, float("nan"))
        packed.collect(out, holes, collected)
        known = ~collected.isnan()
        assert torch.equal(collected[known], theta[known])
        assert int(known.sum()) == int((~mask.mask.view(rows, -1)[r0:r1]).sum())


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float64])
def test_assembly_in_another_dtype_is_the_cast(out):
    w, mask = _masked((9, 33))
    packed, dense = _packed(w, mask, 8)
    theta = torch.randn(mask.n_pruned)
    got = packed.assemble(theta, 0, 9, torch.empty(9, 33, dtype=out))
    assert torch.equal(got, scatter_theta_(dense, theta, mask).to(out))


@pytest.mark.parametrize("sparsity", [0.0, 0.999])
def test_no_holes_and_no_active(sparsity):
    w, mask = _masked((4, 300), sparsity)
    packed, dense = _packed(w, mask, 4)
    theta = torch.randn(mask.n_pruned)
    got = packed.assemble(theta, 0, 4, torch.empty(4, 300))
    assert torch.equal(got, scatter_theta_(dense, theta, mask))


def test_tiles_respect_limit_and_starts():
    w, mask = _masked((10, 8))
    packed, _ = _packed(w, mask, 4)
    assert list(packed.tiles(24)) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert list(packed.tiles(24, [5])) == [(0, 3), (3, 5), (5, 8), (8, 10)]
    assert list(packed.tiles(1)) == [(i, i + 1) for i in range(10)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_checksum_sees_any_changed_or_exchanged_active_bit(dtype):
    w, mask = _masked((40, 70), dtype=dtype)
    before = active_checksum(w, mask)
    changed = scatter_theta_(w.clone(), torch.randn(mask.n_pruned), mask)
    assert active_checksum(changed, mask) == before
    for i in mask.active_indices[::97].tolist():
        other = w.clone()
        word = other.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[w.element_size()])
        word.view(-1)[i] ^= 1  # the last bit of the mantissa
        assert active_checksum(other, mask) != before
    i, j = mask.active_indices[[0, -1]].tolist()
    swapped = w.clone()
    swapped.view(-1)[[i, j]] = w.view(-1)[[j, i]]
    assert active_checksum(swapped, mask) != before
    zero = w.clone()
    zero.view(-1)[i] = 0.0
    minus = zero.clone()
    minus.view(-1)[i] = -0.0
    assert active_checksum(zero, mask) != active_checksum(minus, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_theta_are_zero_where_pruned(dtype):
    weight = torch.randn(6, 11)
    mask = SparseMask(torch.rand(6, 11) > 0.4)
    q = quantize(weight, 4, "per_channel", mask.mask)
    rows = PackedRows(pack_codes(q.codes[mask.mask], 4), mask.packed, q.scale, q.zero, row_offsets(mask), 11, 4)
    zeros = torch.zeros(mask.n_pruned)
    out = torch.full((4, 11), torch.nan, dtype=dtype)
    assert torch.equal(rows.assemble(None, 1, 5, out), rows.assemble(zeros, 1, 5, torch.empty(4, 11, dtype=dtype)))
    assert not torch.signbit(out[~mask.mask[1:5]]).any()
