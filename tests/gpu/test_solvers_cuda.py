"""SparseGPT and DSnoT on a CUDA device give what they give on the CPU. ``RESU_TEST_DEVICE=cpu`` checks the tests."""

from __future__ import annotations

import os

import pytest
import torch

from resu.core.pattern import NM, Block, Pattern, Unstructured
from resu.pruning.dsnot import dsnot
from resu.pruning.sparsegpt import reconstruct, sparsegpt

pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("RESU_TEST_DEVICE", "cuda")


def layer(stacks: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(stacks, 600, 150, generator=g, dtype=torch.float64) + 0.5
    x = x @ torch.randn(150, 150, generator=g, dtype=torch.float64)
    w = torch.randn(12 * stacks, 150, generator=g, dtype=torch.float64)
    h = 2 / 600 * x.mT @ x
    return w, h if stacks > 1 else h[0], x[0]


@pytest.mark.parametrize("stacks", [1, 3])
@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured("row"), NM(2, 4), Block(4, 5)])
def test_sparsegpt_equals_the_cpu(pattern: Pattern, stacks: int) -> None:
    w, h, _ = layer(stacks)
    expected = sparsegpt(w, h, pattern=pattern, keep=w.numel() // 2)
    for hessian in (h, h.to(DEVICE)):  # the Hessian may lie elsewhere
        solved = sparsegpt(w.to(DEVICE), hessian, pattern=pattern, keep=w.numel() // 2)
        assert torch.equal(solved.mask.cpu(), expected.mask)
        assert torch.allclose(solved.weight.cpu(), expected.weight, rtol=0, atol=1e-8)
        again = reconstruct(w.to(DEVICE), hessian, expected.mask.to(DEVICE))
        assert torch.allclose(again.weight.cpu(), reconstruct(w, h, expected.mask).weight, rtol=0, atol=1e-8)


def test_sparsegpt_in_half_precision_on_the_device() -> None:
    w, h, _ = layer(1)
    solved = sparsegpt(w.bfloat16().to(DEVICE), h.float().to(DEVICE), pattern=Unstructured(), keep=900)
    assert solved.weight.dtype == torch.bfloat16
    assert int(solved.mask.sum()) == 900
    assert bool((solved.weight[~solved.mask] == 0).all())


@pytest.mark.parametrize("pattern", [None, NM(2, 4)])
def test_dsnot_equals_the_cpu(pattern: NM | None) -> None:
    w, _, x = layer(1)
    mean, norm = x.mean(dim=0), x.norm(dim=0)
    mask = (pattern or Unstructured("row")).mask(w.abs() * norm, 0.5)
    for rounds in (5, 50):
        options = {"pattern": pattern, "rounds": rounds, "threshold": 0.0}
        expected = dsnot(w, mask, input_mean=mean, input_norm=norm, **options)
        found = dsnot(w.to(DEVICE), mask.to(DEVICE), input_mean=mean, input_norm=norm.to(DEVICE), **options)
        assert not torch.equal(expected, mask)
        assert torch.equal(found.cpu(), expected)
