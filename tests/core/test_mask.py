"""SparseMask and its bits."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resu.core.mask import SparseMask, pack_bits, unpack_bits

shapes = st.lists(st.integers(1, 19), min_size=0, max_size=4).map(tuple)


def random_bool(shape, seed=0, p=0.5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < p


def numpy_bits(mask):
    rows = mask.shape[0] if mask.ndim > 1 else 1
    return np.packbits(mask.numpy().reshape(rows, -1), axis=-1, bitorder="little")


@given(shape=shapes, seed=st.integers(0, 2**16))
def test_bits_are_those_of_numpy_and_come_back(shape, seed):
    mask = random_bool(shape, seed)
    packed = pack_bits(mask)
    assert np.array_equal(packed.numpy(), numpy_bits(mask))
    back = unpack_bits(packed, shape)
    assert torch.equal(back, mask)
    assert back.is_contiguous()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (3, 0, 2)])
def test_empty_masks_have_no_bits(shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    assert torch.equal(unpack_bits(pack_bits(mask), shape), mask)
    assert SparseMask(mask).sparsity == 0.0


@pytest.mark.parametrize("start", range(9))
def test_views_that_start_anywhere_are_packed(start):
    flat = random_bool((64,), 3)
    part = flat[start : start + 16]
    assert np.array_equal(pack_bits(part).numpy(), numpy_bits(part.clone()))


def test_transposed_and_expanded_masks_are_packed():
    mask = random_bool((5, 11), 1)
    assert torch.equal(SparseMask(mask.t()).mask, mask.t())
    assert torch.equal(SparseMask(mask[:1].expand(4, 11)).mask, mask[:1].expand(4, 11))


@given(shape=shapes, seed=st.integers(0, 99))
def test_properties_agree_with_the_bool_tensor(shape, seed):
    mask = random_bool(shape, seed)
    m = SparseMask(mask)
    flat = mask.reshape(-1)
    assert m.shape == mask.shape
    assert m.numel == mask.numel()
    assert m.n_active == int(mask.sum())
    assert m.n_pruned == int((~mask).sum())
    assert m.sparsity == m.n_pruned / m.numel
    assert torch.equal(m.active_indices, flat.nonzero().view(-1))
    assert torch.equal(m.pruned_indices, (~flat).nonzero().view(-1))
    assert m.active_indices.dtype == torch.int64
    rows = shape[0] if len(shape) > 1 else 1
    assert m.nbytes == rows * -(-mask.numel() // rows // 8)


def test_one_bit_per_weight():
    assert SparseMask(random_bool((128, 256))).nbytes == 128 * 256 // 8


def test_trap_03_a_mask_is_never_guessed_from_values():
    weight = torch.tensor([[0.0, 1.0]])
    for wrong in (weight, weight.int(), [[True]], np.array([True])):
        with pytest.raises(TypeError, match="bool"):
            SparseMask(wrong)


def test_trap_03_kept_zeros_stay_kept():
    mask = SparseMask(torch.tensor([True, True, False]))
    weight = torch.tensor([0.0, 1.0, 5.0])
    assert mask.get_active(weight).tolist() == [0.0, 1.0]
    assert mask.n_active == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8])
def test_trap_08_pruned_positions_are_positive_zero_and_nan_does_not_survive(dtype):
    mask = SparseMask(torch.tensor([[True, False, False, False]]))
    if dtype.is_floating_point:
        x = torch.tensor([[-1.0, -2.0, float("nan"), float("-inf")]], dtype=dtype)
    else:
        x = torch.tensor([[-1, -2, 3, -4]], dtype=dtype)
    for result in (mask.apply(x), mask.apply_(x.clone())):
        assert result.tolist() == [[-1, 0, 0, 0]]
        if dtype.is_floating_point:
            assert not torch.signbit(result[0, 1:]).any()
    assert bool(torch.isnan(x[0, 2])) or not dtype.is_floating_point  # apply() left its input alone


def test_apply_keeps_minus_zero_and_bits_of_active_values():
    x = torch.tensor([-0.0, 1.5])
    assert torch.signbit(SparseMask(torch.tensor([True, True])).apply_(x)[0])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bool])
def test_eight_bit_values_are_zeroed_in_place(dtype):
    keep = random_bool((5, 9), 1)
    x = torch.ones(5, 18).to(dtype)[:, ::2]
    assert SparseMask(keep).apply_(x) is x
    assert torch.equal(x.float(), keep.float())
    SparseMask(keep).zero_(x, active=True)
    assert not x.float().any()


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@given(seed=st.integers(0, 50))
@settings(max_examples=15)
def test_in_place_edits_on_any_layout(layout, seed):
    generator = torch.Generator().manual_seed(seed)
    x = {
        "contiguous": lambda: torch.randn(6, 13, generator=generator),
        "transposed": lambda: torch.randn(13, 6, generator=generator).t(),
        "strided": lambda: torch.randn(6, 26, generator=generator)[:, ::2],
    }[layout]()
    keep, source = random_bool((6, 13), seed), torch.randn(6, 13, generator=generator)
    mask, before = SparseMask(keep), x.clone()
    for active in (True, False):
        y = x.clone() if layout == "contiguous" else x
        y.copy_(before)
        mask.zero_(y, active=active)
        assert torch.equal(y, before.masked_fill(keep if active else ~keep, 0))
    x.copy_(before)
    mask.restore_(x, source)
    assert torch.equal(x, torch.where(keep, source, before))


def test_restore_is_bit_exact_for_nan_payloads():
    keep = torch.tensor([True, False])
    source = torch.tensor([0x7FC01234, 1], dtype=torch.int32).view(torch.float32)
    x = torch.zeros(2)
    SparseMask(keep).restore_(x, source)
    assert x.view(torch.int32).tolist() == [0x7FC01234, 0]


def test_apply_has_gradients_for_active_positions_only():
    x = torch.randn(2, 3, requires_grad=True)
    keep = torch.tensor([[True, False, True], [False, True, False]])
    SparseMask(keep).apply(x).sum().backward()
    assert torch.equal(x.grad, keep.float())


def test_apply_in_place_needs_no_autograd():
    x = torch.nn.Parameter(torch.ones(3))
    SparseMask(torch.tensor([True, False, True])).apply_(x)
    assert x.tolist() == [1.0, 0.0, 1.0]
    assert x.grad_fn is None


def test_active_and_pruned_values_together_are_the_tensor():
    x, keep = torch.randn(5, 7), random_bool((5, 7), 4)
    m = SparseMask(keep)
    assert torch.equal(m.get_active(x), x[keep])
    assert torch.equal(m.get_pruned(x), x[~keep])


@pytest.mark.parametrize("call", ["apply", "apply_", "get_active", "get_pruned"])
def test_input_a_tensor_of_another_shape_is_an_error(call):
    m = SparseMask(random_bool((2, 3)))
    with pytest.raises(ValueError, match=r"\(2, 3\) used on a tensor of shape \(3, 2\)"):
        getattr(m, call)(torch.zeros(3, 2))


# -- constructors --------------------------------------------------------------------------------------


@given(n=st.integers(1, 60), digits=st.integers(0, 99), seed=st.integers(0, 99))
def test_from_magnitude_keeps_the_largest(n, digits, seed):
    w = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    m = SparseMask.from_magnitude(w, digits / 100)
    assert m.n_pruned == n * digits // 100
    if m.n_pruned > 0:
        assert m.get_pruned(w).abs().max() <= m.get_active(w).abs().min()


def test_from_magnitude_refuses_nan():
    with pytest.raises(ValueError, match="weight holds 1 NaN"):
        SparseMask.from_magnitude(torch.tensor([1.0, float("nan")]), 0.5)


@given(shape=shapes.filter(len), digits=st.integers(0, 99), seed=st.integers(0, 99))
def test_trap_04_random_masks_have_an_exact_count_and_repeat(shape, digits, seed):
    first = SparseMask.random(shape, digits / 100, torch.Generator().manual_seed(seed))
    again = SparseMask.random(shape, digits / 100, torch.Generator().manual_seed(seed))
    assert first == again
    assert first.n_pruned == first.numel * digits // 100


def test_random_masks_differ_and_are_uniform():
    generator = torch.Generator().manual_seed(0)
    total = sum(SparseMask.random((4, 5), 0.5, generator).mask.int() for _ in range(400))
    assert abs(total.float() - 200).max() < 60  # 6 standard deviations


# -- value semantics -----------------------------------------------------------------------------------


def test_state_copies_and_pickles_are_equal_masks():
    m = SparseMask(random_bool((3, 10), 7))
    for other in (
        SparseMask.from_state_dict(m.state_dict()),
        SparseMask.from_packed(m.packed, m.shape),
        copy.deepcopy(m),
        pickle.loads(pickle.dumps(m)),
        m.to("cpu"),
    ):
        assert other == m
        assert other.n_active == m.n_active
        assert other.checksum() == m.checksum()
    assert all(isinstance(v, torch.Tensor) for v in m.state_dict().values())


def test_equality_looks_at_shape_and_bits():
    m = SparseMask(random_bool((2, 8), 1))
    assert m != SparseMask(m.mask.view(8, 2))
    assert m != SparseMask(~m.mask)
    assert m != "mask"
    assert m.checksum() != SparseMask(m.mask.view(4, 4)).checksum()
    with pytest.raises(TypeError, match="unhashable"):
        hash(m)


def test_changing_the_source_does_not_change_the_mask():
    source = torch.tensor([True, False])
    m = SparseMask(source)
    source.fill_(False)
    assert m.n_active == int(m.mask.sum()) == 1


@pytest.mark.parametrize(
    ("packed", "shape", "said"),
    [
        (torch.zeros(2, 2, dtype=torch.uint8), (2, 8), "needs"),
        (torch.zeros(2, 1, dtype=torch.int32), (2, 8), "torch.int32"),
        (torch.tensor([[0b100]], dtype=torch.uint8), (1, 2), "padding"),
    ],
)
def test_input_damaged_bits_are_an_error(packed, shape, said):
    with pytest.raises(ValueError, match=said):
        SparseMask.from_packed(packed, shape)


def test_input_a_state_with_other_keys_is_an_error():
    with pytest.raises(ValueError, match="'packed' and 'shape'"):
        SparseMask.from_state_dict({"mask": torch.ones(2)})
