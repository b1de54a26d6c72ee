"""The bitmask layout against its description, byte by byte."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resu.core.mask import SparseMask
from resu.formats.bitmask import bitmask_prefixes, pack_bitmask, unpack_bitmask

shapes = st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple)


@given(shape=shapes, seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_weights_come_back_bit_for_bit(shape, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(shape, generator=generator) < 0.5
    weight = torch.randn(shape, generator=generator).to(dtype) * keep
    back, mask = unpack_bitmask(pack_bitmask(weight, SparseMask(keep)))
    assert back.dtype == dtype
    assert torch.equal(back, weight.masked_fill(~keep, 0))
    assert mask == SparseMask(keep)


def test_trap_03_kept_zeros_are_stored():
    weight = torch.tensor([[0.0, 5.0, 0.0], [0.0, 0.0, 7.0]])
    keep = torch.tensor([[True, True, False], [False, True, True]])
    parts = pack_bitmask(weight, SparseMask(keep))
    assert parts["compressed"].tolist() == [0.0, 5.0, 0.0, 7.0]
    assert parts["row_offsets"].tolist() == [0, 2]
    back, mask = unpack_bitmask(parts)
    assert torch.equal(back, weight)
    assert torch.equal(mask.mask, keep)


def test_the_layout_is_as_described():
    keep = torch.rand(5, 13) < 0.4
    weight = torch.randn(5, 13)
    parts = pack_bitmask(weight, SparseMask(keep))
    assert parts["shape"].tolist() == [5, 13]
    assert parts["shape"].dtype == parts["row_offsets"].dtype == torch.int64
    assert torch.equal(parts["compressed"], weight[keep])
    assert np.array_equal(parts["bitmask"].numpy(), np.packbits(keep.numpy(), axis=-1, bitorder="little"))
    counts = keep.sum(dim=1)
    assert torch.equal(parts["row_offsets"], counts.cumsum(0) - counts)


def test_the_24_variant_is_read():
    weight = torch.tensor([[1.0, 2.0, 0.0, 0.0, 0.0, 3.0, 0.0, 4.0]])
    parts = {
        "shape": torch.tensor([[1], [8]]),
        "compressed": torch.tensor([[1.0, 2.0, 3.0, 4.0]]),
        "bitmask": torch.tensor([[0b10100011]], dtype=torch.uint8),
    }
    assert torch.equal(unpack_bitmask(parts)[0], weight)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("compressed", lambda t: t[:-1]),
        ("bitmask", lambda t: t ^ 1),
        ("bitmask", lambda t: t[:1]),
        ("row_offsets", lambda t: t + 1),
        ("shape", lambda t: t + 7),
        ("shape", lambda t: -t),
    ],
)
def test_input_parts_that_do_not_fit_are_an_error(part, change):
    keep = torch.tensor([[True, False, True], [True, True, False]])
    parts = pack_bitmask(torch.randn(2, 3), SparseMask(keep))
    with pytest.raises(ValueError, match=r"'w\.weight'"):
        unpack_bitmask({**parts, part: change(parts[part])}, "w.weight")


def test_prefixes_are_found_by_their_parts():
    names = dict.fromkeys(
        ["a.compressed", "a.bitmask", "a.shape", "b.bitmask", "compressed", "bitmask", "shape", "c.compressed"]
    )
    assert bitmask_prefixes(names) == ["a.", ""]
