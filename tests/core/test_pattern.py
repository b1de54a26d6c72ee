"""Patterns against loops that say what they mean."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resu.core.pattern import NM, Block, Channel, Unstructured, get_pattern, patterns

sparsities = st.integers(0, 99).map(lambda d: d / 100)
weights = st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple)


def scores_of(shape, seed, levels=None):
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(0, levels, shape, generator=generator).float()
    return torch.randn(shape, generator=generator)


def stable_top(values, keep):
    order = sorted(range(len(values)), key=lambda i: -values[i])
    return [i in set(order[:keep]) for i in range(len(values))]


@given(shape=weights, sparsity=sparsities, seed=st.integers(0, 999), levels=st.sampled_from([None, 3]))
def test_unstructured_over_the_tensor(shape, sparsity, seed, levels):
    scores = scores_of(shape, seed, levels)
    mask = Unstructured().mask(scores, sparsity)
    n = scores.numel()
    assert mask.view(-1).tolist() == stable_top(
        scores.view(-1).tolist(), n - math.floor(round(n * sparsity * 100) / 100)
    )


@given(shape=weights, sparsity=sparsities, seed=st.integers(0, 999), levels=st.sampled_from([None, 3]))
def test_trap_35_row_scope_compares_within_rows(shape, sparsity, seed, levels):
    scores = scores_of(shape, seed, levels)
    mask = Unstructured("row").mask(scores, sparsity)
    n = scores[0].numel()
    keep = n - math.floor(round(n * sparsity * 100) / 100)
    for row, kept in zip(scores, mask, strict=True):
        assert kept.view(-1).tolist() == stable_top(row.view(-1).tolist(), keep)


@given(rows=st.integers(1, 6), n=st.integers(1, 8), seed=st.integers(0, 99), data=st.data())
def test_row_scope_spreads_any_count(rows, n, seed, data):
    keep = data.draw(st.integers(1, rows * n))
    mask = Unstructured("row").select(scores_of((rows, n), seed), keep)
    counts = mask.sum(dim=1)
    assert int(counts.sum()) == keep
    assert counts.tolist() == sorted(counts.tolist(), reverse=True)
    assert Unstructured("row").violations(mask) == 0


@settings(max_examples=60)
@given(
    shape=weights,
    nm=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8)]),
    seed=st.integers(0, 999),
    levels=st.sampled_from([None, 2]),
)
def test_trap_06_n_of_m_keeps_n(shape, nm, seed, levels):
    n, m = nm
    scores = scores_of(shape, seed, levels)
    pattern = NM(n, m)
    mask = pattern.mask(scores, 1 - n / m)
    columns = scores.movedim(1, -1).reshape(-1, shape[1])
    kept = mask.movedim(1, -1).reshape(-1, shape[1])
    for row, row_kept in zip(columns.tolist(), kept.tolist(), strict=True):
        for start in range(0, shape[1], m):
            group = row[start : start + m]
            assert row_kept[start : start + m] == stable_top(group, min(n, len(group)))
    assert int(mask.sum()) == pattern.reachable(shape, 1) == pattern.keep_for(shape, 1 - n / m)
    assert pattern.violations(mask) == 0


def test_n_of_m_has_one_sparsity():
    assert NM(1, 4).sparsity == 0.75
    with pytest.raises(ValueError, match=r"2:4 has sparsity 0.5 and no other"):
        NM(2, 4).mask(torch.rand(4, 4), 0.75)
    for n, m in ((0, 4), (4, 4), (5, 4)):
        with pytest.raises(ValueError, match="N of M"):
            NM(n, m)


def test_n_of_m_takes_lowest_finite_scores_and_integers():
    low = torch.finfo(torch.float32).min
    assert NM(1, 4).mask(torch.tensor([[low, low, low]]), 0.75).tolist() == [[True, False, False]]
    assert NM(1, 2).mask(torch.tensor([[1, 3, 2]]), 0.5).tolist() == [[False, True, True]]
    assert NM(1, 2).mask(torch.tensor([[True, False, False]]), 0.5).tolist() == [[True, False, True]]


def blocks_of(shape, h, w):
    rows, columns = shape[0], math.prod(shape[1:])
    return [
        [r * columns + c for r in range(i, min(i + h, rows)) for c in range(j, min(j + w, columns))]
        for i in range(0, rows, h)
        for j in range(0, columns, w)
    ]


@settings(max_examples=60)
@given(shape=weights, h=st.integers(1, 5), w=st.integers(1, 5), sparsity=sparsities, seed=st.integers(0, 999))
def test_blocks_live_and_die_together_and_are_counted_exactly(shape, h, w, sparsity, seed):
    scores = scores_of(shape, seed, 5)
    pattern = Block(h, w)
    mask = pattern.mask(scores, sparsity).view(-1)
    blocks = blocks_of(shape, h, w)
    means = [scores.view(-1)[block].mean().item() for block in blocks]
    keep = len(blocks) - math.floor(round(len(blocks) * sparsity * 100) / 100)
    assert [bool(mask[block].all()) for block in blocks] == stable_top(means, keep)
    assert [bool(mask[block].any()) for block in blocks] == stable_top(means, keep)
    assert pattern.violations(mask.view(shape)) == 0
    if shape[0] % h == 0 and math.prod(shape[1:]) % w == 0:
        assert int(mask.sum()) == pattern.keep_for(shape, sparsity)


@given(shape=weights, h=st.integers(1, 5), w=st.integers(1, 5), data=st.data())
def test_counts_of_blocks_are_stable_and_dense_stays_dense(shape, h, w, data):
    pattern, n = Block(h, w), math.prod(shape)
    keep = data.draw(st.integers(1, n))
    reached = pattern.reachable(shape, keep)
    assert pattern.reachable(shape, reached) == reached <= n
    scores = scores_of(shape, 0)
    assert torch.equal(pattern.select(scores, keep), pattern.select(scores, reached))
    assert bool(pattern.select(scores, n).all())
    assert pattern.keep_for(shape, 0.0) == n


def test_a_ragged_weight_of_all_blocks_keeps_everything():
    # 17 rows in blocks of 16: 17 // 16 is one block, and the weight has two.
    assert bool(Block(16, 1).select(torch.rand(17, 1), 17).all())
    assert int(Block(16, 1).mask(torch.rand(17, 1), 0.5).sum()) in (1, 16)


def test_edge_blocks_compete_by_mean():
    scores = torch.tensor([[1.0, 1.0, 1.5]])
    assert Block(1, 2).mask(scores, 0.5).tolist() == [[False, False, True]]


def test_block_scores_do_not_overflow_in_half_precision():
    scores = torch.full((16, 32), 60000.0, dtype=torch.float16)
    scores[:, :16] = 59000.0
    mask = Block(16, 16).mask(scores, 0.5)
    assert mask[:, 16:].all()
    assert not mask[:, :16].any()


@given(shape=weights, sparsity=sparsities, seed=st.integers(0, 999), data=st.data())
def test_channels_live_and_die_together(shape, sparsity, seed, data):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    scores = scores_of(shape, seed)
    pattern = Channel(dim)
    mask = pattern.mask(scores, sparsity)
    slices = mask.movedim(dim, 0).reshape(shape[dim], -1)
    means = scores.double().movedim(dim, 0).reshape(shape[dim], -1).mean(dim=1).tolist()
    keep = shape[dim] - math.floor(round(shape[dim] * sparsity * 100) / 100)
    assert slices.all(dim=1).tolist() == slices.any(dim=1).tolist()
    assert int(slices.all(dim=1).sum()) == keep
    assert int(mask.sum()) == pattern.keep_for(shape, sparsity) == pattern.reachable(shape, int(mask.sum()))
    kept = sorted((m for m, k in zip(means, slices.all(dim=1).tolist(), strict=True) if k), reverse=True)
    assert kept == pytest.approx(sorted(means, reverse=True)[:keep], abs=1e-6)


def test_a_channel_dimension_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match=r"Channel\(dim=2\) does not exist"):
        Channel(2).mask(torch.rand(3, 3), 0.5)


def test_broken_masks_are_counted():
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[0, 0] = False
    assert NM(2, 4).violations(mask) == 4
    assert Block(2, 2).violations(mask) == 1
    assert Channel(0).violations(mask) == 1
    assert Channel(1).violations(mask) == 1
    assert Unstructured("row").violations(mask) == 0
    mask[0] = False
    assert Unstructured("row").violations(mask) == 1 or Unstructured("row").violations(mask) == 4
    assert Unstructured().violations(mask) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["unstructured", "row", "2:4", "block:2x2", "channel:0"])
def test_input_scores_that_are_not_finite_are_an_error(name, bad):
    scores = torch.rand(4, 4)
    scores[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        get_pattern(name).mask(scores, 0.5)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        (None, Unstructured()),
        ("unstructured", Unstructured()),
        ("tensor", Unstructured()),
        ("row", Unstructured("row")),
        ("2:4", NM(2, 4)),
        ("nm", NM()),
        ("block:16x1", Block(16, 1)),
        ("block", Block()),
        ("channel:1", Channel(1)),
        (Block(2, 3), Block(2, 3)),
    ],
)
def test_patterns_have_names(text, pattern):
    assert get_pattern(text) == pattern
    assert get_pattern(str(pattern)) == pattern


def test_unknown_patterns_list_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown pattern 'blocks'; write 'tensor', 'row', 'N:M'.*registered name: block, channel, nm"
    ):
        get_pattern("blocks")


@pytest.mark.parametrize(
    "text", ["2:x", "2", "4:2", "block:16", "block:0x1", "channel:a", "nm:1:4", "unstructured:row"]
)
def test_patterns_that_cannot_be_read_are_errors(text):
    with pytest.raises(ValueError, match=r"unknown pattern|N:M keeps N of M|block needs"):
        get_pattern(text)


def test_other_types_are_no_pattern():
    with pytest.raises(TypeError, match="a pattern is"):
        get_pattern(24)
    with pytest.raises(ValueError, match="scope must be"):
        Unstructured("column")


def test_the_registry_has_what_the_tests_know():
    assert list(patterns) == ["block", "channel", "nm", "unstructured"]
