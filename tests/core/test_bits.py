"""Counting bits: NumPy's way and torch's are the same."""

import numpy as np
import pytest
import torch

from resu.core.bits import count_bits, pack_bits


@pytest.mark.parametrize("shape", [(3, 21), (0, 4), (4, 0), (100, 130), (1, 1)])
def test_both_ways_of_counting(shape, monkeypatch):
    mask = torch.rand(shape) > 0.5
    packed = pack_bits(mask)
    expected = mask.sum(dim=1)
    for _ in range(2):
        found = count_bits(packed)
        assert torch.equal(found, expected)
        assert found.dtype == torch.int64
        monkeypatch.delattr(np, "bitwise_count", raising=False)
