"""DSnoT against a restatement that goes row by row and swap by swap."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resu.core.pattern import NM, Block, Unstructured
from resu.pruning.dsnot import dsnot
from tests.reference import dsnot as reference


def layer(rows, columns, seed=0, dtype=torch.float64):
    """A weight, and mean, norm and variance of inputs whose means are far from 0."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    x = torch.randn(64, columns, generator=g, dtype=torch.float64) * torch.rand(columns, generator=g)
    x = x + torch.randn(columns, generator=g, dtype=torch.float64)
    return w.to(dtype), x.mean(dim=0).to(dtype), x.norm(dim=0).to(dtype), x.var(dim=0).to(dtype)


def wanda(w, norm, pattern=None, sparsity=0.5):
    return (pattern or Unstructured("row")).mask(w.abs() * norm, sparsity)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("varied", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "nm", "rounds", "threshold"),
    [
        (40, 12, None, 50, 0.1),
        (9, 37, None, 50, 0.0),
        (5, 90, None, 3, 0.0),  # more columns than the rounds can reach
        (5, 260, None, 50, 0.0),
        (40, 16, (2, 4), 50, 0.1),
        (7, 30, (2, 4), 50, 0.0),
        (5, 61, (1, 4), 4, 0.0),
        (4, 50, (2, 3), 3, 0.0),
    ],
)
def test_masks_are_the_papers(rows, columns, nm, rounds, threshold, varied, dtype):
    w, mean, norm, variance = layer(rows, columns, columns, dtype)
    pattern = NM(*nm) if nm else None
    before = wanda(w, norm, pattern, pattern.sparsity if pattern else 0.5)
    options = {"input_variance": variance} if varied else {}
    after = dsnot(
        w,
        before,
        input_mean=mean,
        input_norm=norm,
        pattern=pattern,
        rounds=rounds,
        threshold=threshold,
        **options,
    )
    expected = reference.refine(
        w.numpy(),
        before.numpy(),
        mean.numpy(),
        norm.numpy(),
        variance=variance.numpy() if varied else None,
        m=nm[1] if nm else None,
        rounds=rounds,
        threshold=threshold,
    )
    assert (expected != before.numpy()).any()
    assert torch.equal(after, torch.from_numpy(expected))


@settings(max_examples=80)
@given(st.data())
def test_counts_stay_and_the_residual_never_grows(data):
    rows, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 60))
    w, mean, norm, _ = layer(rows, columns, data.draw(st.integers(0, 2**31)))
    m = data.draw(st.integers(2, 6))
    pattern = data.draw(st.sampled_from([None, Unstructured("tensor"), Unstructured("row"), NM(1, m), NM(m - 1, m)]))
    sparsity = pattern.sparsity if isinstance(pattern, NM) else data.draw(st.floats(0, 0.9))
    before = wanda(w, norm, pattern, sparsity)
    if data.draw(st.booleans()):
        w, mean = w.round(), mean.sign()  # ties
    rounds, threshold = data.draw(st.integers(0, 20)), data.draw(st.sampled_from([0.0, 0.1, 1.0]))
    after = dsnot(w, before, input_mean=mean, input_norm=norm, pattern=pattern, rounds=rounds, threshold=threshold)
    assert torch.equal(after.sum(dim=1), before.sum(dim=1))
    assert ((after ^ before).sum(dim=1) <= 2 * rounds).all()
    if isinstance(pattern, NM):
        assert pattern.violations(after) == 0
        assert torch.equal(pattern._groups(after, False).sum(1), pattern._groups(before, False).sum(1))
    missing = [reference.residual(w.numpy(), one.numpy(), mean.numpy()) for one in (before, after)]
    assert (np.abs(missing[1]) <= np.abs(missing[0]) + 1e-12).all()
    done = (after == before).all(dim=1).numpy() | (np.abs(missing[0]) > threshold)
    assert done.all()
    expected = reference.refine(
        w.numpy(),
        before.numpy(),
        mean.numpy(),
        norm.numpy(),
        m=pattern.m if isinstance(pattern, NM) else None,
        rounds=rounds,
        threshold=threshold,
    )
    assert torch.equal(after, torch.from_numpy(expected))


def test_most_of_the_missing_mean_output_comes_back():
    w, mean, norm, _ = layer(64, 256)
    before = wanda(w, norm)
    after = dsnot(w, before, input_mean=mean, input_norm=norm)
    missing = [np.abs(reference.residual(w.numpy(), one.numpy(), mean.numpy())) for one in (before, after)]
    assert missing[1].mean() < 0.2 * missing[0].mean()


def test_inputs_of_mean_zero_give_nothing_to_do():
    w, mean, norm, _ = layer(8, 16)
    before = wanda(w, norm)
    assert torch.equal(dsnot(w, before, input_mean=0 * mean, input_norm=norm), before)


def test_a_convolution_swaps_within_groups_of_input_channels():
    w, mean, norm, _ = layer(40, 6 * 4)
    shape = (40, 6, 2, 2)
    pattern = NM(2, 4)
    before = pattern.mask((w.abs() * norm).view(shape), 0.5)
    after = dsnot(
        w.view(shape), before, input_mean=mean.view(shape[1:]), input_norm=norm.view(shape[1:]), pattern=pattern
    )
    assert after.shape == shape
    assert pattern.violations(after) == 0
    assert not torch.equal(after, before)
    # By channel, as for Wanda; and without N:M it is the unfolded matrix.
    by_channel = dsnot(w.view(shape), before, input_mean=mean[:6], input_norm=norm[:6])
    wide = mean[:6].repeat_interleave(4), norm[:6].repeat_interleave(4)
    flat = dsnot(w, before.flatten(1), input_mean=wide[0], input_norm=wide[1])
    assert torch.equal(by_channel.flatten(1), flat)


def test_rows_may_see_different_inputs():
    two = [layer(3, 12, seed) for seed in (1, 2)]
    w = torch.cat([one[0] for one in two])
    mean, norm = (torch.cat([one[k].expand(3, 12) for one in two]) for k in (1, 2))
    before = wanda(w, norm)
    after = dsnot(w, before, input_mean=mean, input_norm=norm)
    for k, (one, m, n, _) in enumerate(two):
        part = slice(3 * k, 3 * k + 3)
        assert torch.equal(after[part], dsnot(one, before[part], input_mean=m, input_norm=n))


def test_half_precision_is_ranked_in_single_and_arguments_are_left_alone():
    w, mean, norm, _ = layer(8, 32, dtype=torch.float32)
    w = w.to(torch.bfloat16)
    before = wanda(w.float(), norm)
    copies = w.clone(), before.clone(), mean.clone()
    after = dsnot(w, before, input_mean=mean, input_norm=norm)
    assert torch.equal(after, dsnot(w.float(), before, input_mean=mean, input_norm=norm))
    assert all(torch.equal(a, b) for a, b in zip((w, before, mean), copies, strict=True))
    assert after.data_ptr() != before.data_ptr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(4, 7, dtype=torch.bool)}, "bool mask of the weight's shape"),
        ({"mask": torch.ones(4, 8)}, "bool mask of the weight's shape"),
        ({"weight": torch.ones(4, 8, dtype=torch.int64)}, "floating weights"),
        ({"weight": torch.full((4, 8), float("nan"))}, "weight holds 32 NaN"),
        ({"input_mean": torch.ones(7)}, r"input_mean of shape \(7,\) does not fit"),
        ({"input_mean": torch.full((8,), float("inf"))}, "input_mean holds 8 NaN or infinite"),
        ({"input_norm": -torch.ones(8)}, "input_norm must be 0 or more"),
        ({"input_variance": -torch.ones(8)}, "input_variance must be 0 or more"),
        ({"pattern": Block(2, 2)}, "swaps single weights"),
        ({"pattern": NM(2, 4)}, "breaks 2:4 in 8 groups"),
        ({"rounds": -1}, "0 or more"),
        ({"rounds": 2.5}, "0 or more"),
        ({"threshold": float("nan")}, "0 or more"),
    ],
)
def test_input_is_refused_with_a_reason(change, message):
    options = {
        "weight": torch.randn(4, 8),
        "mask": torch.ones(4, 8, dtype=torch.bool),
        "input_mean": torch.ones(8),
        "input_norm": torch.ones(8),
    } | change
    with pytest.raises(ValueError, match=message):
        dsnot(options.pop("weight"), options.pop("mask"), **options)
