"""The SparseGPT solver against a restatement that inverts the Hessian anew at each column."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resu.core.pattern import NM, Block, Channel, Unstructured
from resu.pruning.sparsegpt import reconstruct, sparsegpt
from tests.reference import sparsegpt as reference


def layer(rows, columns, tokens=None, seed=0, dtype=torch.float64, scale=None):
    """A weight and the Hessian of correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    tokens = 2 * columns + 8 if tokens is None else tokens
    mix = torch.randn(columns, columns, generator=g, dtype=torch.float64) / columns**0.5
    x = torch.randn(tokens, columns, generator=g, dtype=torch.float64)
    x = x @ (mix + 0.3) + torch.randn(columns, generator=g, dtype=torch.float64)
    if scale is not None:
        x = x * scale
    w = torch.randn(rows, columns, generator=g, dtype=torch.float64) / columns**0.5
    return w.to(dtype), (2 / tokens * x.T @ x).to(dtype)


def kill(hessian, *columns):
    hessian = hessian.clone()
    for j in columns:
        hessian[j], hessian[:, j] = 0, 0
    return hessian


def assert_same(solved, expected, tolerance):
    weight, mask = expected
    assert torch.equal(solved.mask.flatten(1), torch.from_numpy(mask))
    np.testing.assert_allclose(solved.weight.double().flatten(1).numpy(), weight, rtol=0, atol=tolerance)
    gone = solved.weight[~solved.mask]
    assert bool((gone == 0).all())
    assert not bool(torch.signbit(gone).any())


CASES = [
    # rows, columns, block, pattern, keep share
    (4, 8, 128, "tensor", 0.5),
    (7, 37, 16, "tensor", 0.3),
    (6, 150, 128, "tensor", 0.5),
    (3, 130, 128, "tensor", 0.21),
    (5, 37, 16, "row", 0.47),
    (4, 140, 128, "row", 0.5),
    (4, 32, 16, (2, 4), 0.5),
    (5, 30, 16, (2, 4), 0.5),
    (3, 134, 128, (2, 4), 0.5),
    (4, 45, 16, (1, 4), 0.25),
    (4, 45, 16, (2, 3), 0.6),
    (3, 20, 4, (3, 8), 0.4),
]


def given_as(kind, rows, columns, share):
    keep = round(rows * columns * share)
    if isinstance(kind, tuple):
        return NM(*kind), NM(*kind).reachable((rows, columns), 0), {"nm": kind}
    return Unstructured(kind), keep, {"keep": keep, "scope": kind}


@pytest.mark.parametrize("dead", [(), (0, 3)], ids=["alive", "dead inputs"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("rows", "columns", "block", "kind", "share"), CASES)
def test_weights_and_masks_are_the_papers(rows, columns, block, kind, share, dtype, dead):
    w, h = layer(rows, columns, dtype=dtype, seed=columns)
    h = kill(h, *dead)
    pattern, keep, how = given_as(kind, rows, columns, share)
    solved = sparsegpt(w, h, pattern=pattern, keep=keep, block=block)
    expected = reference.sweep(w.numpy(), h.numpy(), block=block, **how)
    assert_same(solved, expected, 1e-10 if dtype == torch.float64 else 1e-4)
    assert int(solved.mask.sum()) == keep
    assert pattern.violations(solved.mask) == 0
    assert solved.weight.dtype == dtype
    assert solved.damping == 0.01


@settings(max_examples=40)
@given(st.data())
def test_any_small_layer_is_pruned_as_in_the_paper(data):
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 20))
    block, m = data.draw(st.integers(1, 24)), data.draw(st.integers(2, 6))
    kind = data.draw(st.sampled_from(["tensor", "row", (m - 1, m), (1, m)]))
    if isinstance(kind, tuple):
        block = max(m, block // m * m)  # groups do not cross blocks
    w, h = layer(rows, columns, seed=data.draw(st.integers(0, 2**31)))
    pattern, keep, how = given_as(kind, rows, columns, data.draw(st.floats(0, 1)))
    solved = sparsegpt(w, h, pattern=pattern, keep=keep, block=block)
    assert_same(solved, reference.sweep(w.numpy(), h.numpy(), block=block, **how), 1e-8)


@pytest.mark.parametrize("columns", [8, 37, 140])
def test_a_given_mask_is_reconstructed_as_in_the_paper(columns):
    w, h = layer(6, columns, seed=1)
    mask = torch.rand(6, columns, generator=torch.Generator().manual_seed(2)) < 0.5
    solved = reconstruct(w, h, mask)
    weight, kept = reference.sweep(w.numpy(), h.numpy(), mask=mask.numpy())
    plain = w.where(mask, 0).numpy()
    worse = reference.output_error(w.numpy(), weight, h.numpy()) > reference.output_error(w.numpy(), plain, h.numpy())
    assert not worse.all()
    assert_same(solved, (np.where(worse[:, None], plain, weight), kept), 1e-10)
    assert torch.equal(solved.mask, mask)


def test_a_row_that_the_sweep_would_harm_is_plainly_masked():
    # U = [[1, .1, 0], [0, 1, -10], [0, 0, 1]], first and last pruned: the sweep has error 2, plain masking 1.01.
    u = torch.tensor([[1.0, 0.1, 0.0], [0.0, 1.0, -10.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    h = torch.linalg.inv(u.T @ u)
    w, mask = torch.ones(1, 3, dtype=torch.float64), torch.tensor([[False, True, False]])
    swept, _ = reference.sweep(w.numpy(), h.numpy(), mask=mask.numpy(), damping=0.0)
    plain = w.where(mask, 0)
    assert reference.output_error(w.numpy(), swept, h.numpy()) > reference.output_error(
        w.numpy(), plain.numpy(), h.numpy()
    )
    assert torch.equal(reconstruct(w, h, mask, damping=0.0).weight, plain)


@settings(max_examples=60)
@given(st.data())
def test_reconstruction_is_never_worse_than_plain_masking_nor_better_than_least_squares(data):
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 24))
    tokens, seed = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 2**31))
    w, h = layer(rows, columns, tokens, seed)
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < data.draw(st.floats(0, 1))
    block = data.draw(st.integers(1, 30))
    solved = reconstruct(w, h, mask, block=block, damping=data.draw(st.sampled_from([0.001, 0.01, 0.1])))
    exact = w.numpy()
    plain = reference.output_error(exact, w.where(mask, 0).numpy(), h.numpy())
    ours = reference.output_error(exact, solved.weight.numpy(), h.numpy())
    optimum = reference.output_error(exact, reference.least_squares(exact, mask.numpy(), h.numpy()), h.numpy())
    scale = reference.output_error(exact, 0 * exact, h.numpy()) + 1e-12
    assert (ours <= plain + 1e-9 * scale).all()
    assert (ours >= optimum - 1e-7 * scale).all()
    assert torch.equal(solved.mask, mask)
    assert bool((solved.weight[~mask] == 0).all())


def test_the_sweep_gets_most_of_what_least_squares_can_get():
    w, h = layer(16, 64, tokens=512)
    solved = sparsegpt(w, h, pattern=Unstructured("row"), keep=512)
    plain = reference.output_error(w.numpy(), w.where(solved.mask, 0).numpy(), h.numpy()).sum()
    ours = reference.output_error(w.numpy(), solved.weight.numpy(), h.numpy()).sum()
    best = reference.least_squares(w.numpy(), solved.mask.numpy(), h.numpy())
    optimum = reference.output_error(w.numpy(), best, h.numpy()).sum()
    assert optimum < ours < plain
    assert (plain - ours) / (plain - optimum) > 0.8


@settings(max_examples=60)
@given(st.data())
def test_counts_are_exact_and_masks_legal(data):
    rows, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 40))
    w, h = layer(rows, columns, data.draw(st.integers(1, 60)), data.draw(st.integers(0, 2**31)), torch.float32)
    if data.draw(st.booleans()):
        w = torch.ones_like(w)
    if data.draw(st.booleans()):
        h = kill(h, *data.draw(st.lists(st.integers(0, columns - 1), max_size=columns - 1, unique=True)))
    m = data.draw(st.integers(2, 8))
    pattern = data.draw(st.sampled_from([Unstructured(), Unstructured("row"), NM(m - 1, m), NM(1, m)]))
    keep = data.draw(st.integers(0, rows * columns))
    solved = sparsegpt(w, h, pattern=pattern, keep=keep, block=data.draw(st.integers(1, 50)))
    assert int(solved.mask.sum()) == pattern.reachable(w.shape, keep)
    assert pattern.violations(solved.mask) == 0
    assert bool((solved.weight[~solved.mask] == 0).all())
    assert bool(torch.isfinite(solved.weight).all())


@pytest.mark.parametrize("pattern", [Block(4, 2), Block(1, 8), Block(3, 5), Channel(0), Channel(1)])
def test_patterns_across_columns_are_decided_up_front(pattern):
    w, h = layer(12, 40)
    keep = pattern.keep_for(w.shape, 0.5)
    solved = sparsegpt(w, h, pattern=pattern, keep=keep)
    mask = pattern.select(torch.from_numpy(reference.obs_score(w.numpy(), h.numpy())), keep)
    assert_same(solved, reference.sweep(w.numpy(), h.numpy(), mask=mask.numpy()), 1e-10)
    assert pattern.violations(solved.mask) == 0


def test_ties_keep_the_lower_index():
    w, h = torch.ones(2, 4), torch.eye(4)
    mask = sparsegpt(w, h, pattern=Unstructured(), keep=4).mask
    assert mask.tolist() == [[True] * 4, [False] * 4]
    mask = sparsegpt(w, h, pattern=Unstructured("row"), keep=3).mask
    assert mask.tolist() == [[True, True, False, False], [True, False, False, False]]
    assert sparsegpt(w, h, pattern=NM(1, 2), keep=4).mask.tolist() == [[True, False] * 2] * 2


def test_a_convolution_is_seen_as_its_unfolded_matrix():
    w, h = layer(5, 6 * 4)
    solved = sparsegpt(w.view(5, 6, 2, 2), h, pattern=Unstructured(), keep=50, block=16)
    flat = sparsegpt(w, h, pattern=Unstructured(), keep=50, block=16)
    assert torch.equal(solved.weight.flatten(1), flat.weight)
    assert torch.equal(solved.mask.flatten(1), flat.mask)
    assert solved.weight.shape == solved.mask.shape == (5, 6, 2, 2)


def test_n_of_m_counts_input_channels_of_a_convolution():
    w, h = layer(5, 6 * 4)
    pattern = NM(2, 4)
    solved = sparsegpt(w.view(5, 6, 2, 2), h, pattern=pattern, keep=0, block=8)
    assert pattern.violations(solved.mask) == 0
    assert int(solved.mask.sum()) == pattern.reachable((5, 6, 2, 2), 0) == 5 * 4 * 4
    # Groups of 4 and 2 channels at each kernel position, positions outermost.
    order = torch.arange(24).view(6, 4).t().flatten()
    fill = torch.eye(32, dtype=torch.float64)  # short groups filled with inputs that nothing touches
    real = torch.tensor([8 * place + c for place in range(4) for c in range(6)])
    fill[real[:, None], real] = h[order][:, order]
    wide = torch.zeros(5, 32, dtype=torch.float64)
    wide[:, real] = w[:, order]
    scale = float(h.diagonal().mean()) * 0.01
    weight, mask = reference.sweep(
        wide.numpy(),
        fill.numpy() + scale * np.diag(np.isin(np.arange(32), real).astype(float)),
        nm=(2, 4),
        damping=0.0,
    )
    expected = torch.from_numpy(weight)[:, real][:, order.argsort()].view(5, 6, 2, 2)
    assert torch.allclose(solved.weight, expected, rtol=0, atol=1e-10)
    assert torch.equal(solved.mask.flatten(1)[:, order], torch.from_numpy(mask)[:, real])


def test_stacked_experts_have_a_hessian_each():
    layers = [layer(4, 20, seed=s) for s in range(3)]
    w, h = torch.cat([w for w, _ in layers]), torch.stack([h for _, h in layers])
    solved = sparsegpt(w, h, pattern=NM(2, 4), keep=0)
    for k, (one, hessian) in enumerate(layers):
        alone = sparsegpt(one, hessian, pattern=NM(2, 4), keep=0)
        assert torch.equal(solved.mask[4 * k : 4 * k + 4], alone.mask)
        assert torch.allclose(solved.weight[4 * k : 4 * k + 4], alone.weight, atol=1e-12)
    together = sparsegpt(w, h, pattern=Unstructured(), keep=77)
    assert int(together.mask.sum()) == 77
    rows = sparsegpt(w, h, pattern=Unstructured("row"), keep=125)
    assert rows.mask.sum(dim=1).tolist() == [11] * 5 + [10] * 7
    again = reconstruct(w, h, rows.mask)
    for k, (one, hessian) in enumerate(layers):
        alone = reconstruct(one, hessian, rows.mask[4 * k : 4 * k + 4])
        assert torch.allclose(again.weight[4 * k : 4 * k + 4], alone.weight, atol=1e-12)


def test_an_expert_without_tokens_is_left_as_it_is_and_said():
    w, h = layer(4, 8)
    both, hessians = torch.cat([w, w]), torch.stack([h, torch.zeros_like(h)])
    with pytest.warns(UserWarning, match="saw no input"):
        solved = sparsegpt(both, hessians, pattern=Unstructured("row"), keep=32)
    unseen = solved.mask[4:]
    assert torch.equal(solved.weight[4:], w.where(unseen, 0))
    assert torch.equal(unseen, Unstructured("row").select(w.abs(), 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single_and_given_back_in_half(dtype):
    w, h = layer(8, 40, dtype=torch.float32)
    w, before = w.to(dtype), w.to(dtype).clone()
    solved = sparsegpt(w, h, pattern=Unstructured(), keep=160)
    wide = sparsegpt(w.float(), h, pattern=Unstructured(), keep=160)
    assert solved.weight.dtype == dtype
    assert torch.equal(solved.mask, wide.mask)
    assert torch.equal(solved.weight, wide.weight.to(dtype))
    assert torch.equal(w, before)
    assert torch.equal(
        sparsegpt(w, h.to(torch.bfloat16), pattern=Unstructured(), keep=160).mask.sum(), torch.tensor(160)
    )


def test_arguments_are_left_alone():
    w, h = layer(4, 20, dtype=torch.float32)
    h = kill(h, 2)
    w.requires_grad_()
    before, hessian = w.detach().clone(), h.clone()
    solved = sparsegpt(w, h, pattern=Unstructured(), keep=40)
    reconstruct(w, h, solved.mask)
    assert torch.equal(w, before)
    assert torch.equal(h, hessian)
    assert not solved.weight.requires_grad


def test_trap_33_cholesky_failure_raises_the_damping_and_says_so():
    # Rank one and huge: 1e-8 of the mean diagonal drowns in float32.
    x = torch.randn(1, 64) * 100
    h, w = 2 * x.T @ x, torch.randn(8, 64)
    assert int(torch.linalg.cholesky_ex(h + 1e-8 * h.diagonal().mean() * torch.eye(64)).info) > 0
    with pytest.warns(UserWarning, match=r"failed at damping 1e-08; raised to"):
        solved = sparsegpt(w, h, pattern=Unstructured(), keep=256, damping=1e-8)
    assert solved.damping > 1e-8
    assert solved.damping == pytest.approx(10 ** round(np.log10(solved.damping)))
    # Not the identity: the result is that of the damping it reports, far from plain masking.
    expected = sparsegpt(w, h, pattern=Unstructured(), keep=256, damping=solved.damping)
    assert torch.equal(solved.weight, expected.weight)
    assert not torch.allclose(solved.weight, w.where(solved.mask, 0), atol=1e-2)
    with pytest.warns(UserWarning, match="failed at damping 0; raised to"):
        assert reconstruct(w, h, solved.mask, damping=0.0).damping >= 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hessian": torch.full((8, 8), float("nan"))}, "Hessian holds 64 NaN"),
        ({"hessian": torch.eye(8) * float("inf")}, "NaN or infinite"),
        ({"weight": torch.full((4, 8), float("nan"))}, "weight holds 32 NaN"),
        ({"hessian": torch.eye(7)}, "does not fit a weight of shape"),
        ({"hessian": torch.eye(8).expand(3, 8, 8)}, "does not fit a weight of shape"),
        ({"hessian": torch.ones(8)}, r"shape \[in, in\]"),
        ({"hessian": -torch.eye(8)}, "sum of squares"),
        ({"hessian": torch.eye(8) + torch.ones(8, 8).triu(1)}, "not symmetric"),
        ({"hessian": torch.eye(8) + 1e5 * (1 - torch.eye(8))}, "not positive semidefinite"),
        ({"hessian": torch.eye(8, dtype=torch.int64)}, "floating"),
        ({"weight": torch.ones(4, 8, dtype=torch.int32)}, "floating"),
        ({"weight": torch.ones(8)}, r"\[out, in"),
        ({"weight": torch.ones(0, 8), "keep": 0}, "no 0 in it"),
        ({"keep": 33}, "from 0 to 32"),
        ({"keep": -1}, "from 0 to 32"),
        ({"keep": 0.5}, "must be a count"),
        ({"block": 0}, "1 or more"),
        ({"damping": -0.1}, "0 or more"),
        ({"damping": float("nan")}, "0 or more"),
    ],
)
def test_input_is_refused_with_a_reason(change, message):
    options = {"weight": torch.randn(4, 8), "hessian": torch.eye(8), "pattern": Unstructured(), "keep": 16} | change
    with pytest.raises(ValueError, match=message):
        sparsegpt(options.pop("weight"), options.pop("hessian"), **options)


def test_input_mask_of_another_shape_or_dtype_is_refused():
    for mask in (torch.ones(4, 7, dtype=torch.bool), torch.ones(4, 8)):
        with pytest.raises(ValueError, match="bool mask of the weight's shape"):
            reconstruct(torch.randn(4, 8), torch.eye(8), mask)


def test_keeping_everything_changes_nothing_and_keeping_nothing_leaves_zeros():
    w, h = layer(4, 20, dtype=torch.float32)
    everything = sparsegpt(w, h, pattern=Unstructured(), keep=80)
    assert torch.equal(everything.weight, w)
    nothing = sparsegpt(w, h, pattern=Unstructured(), keep=0)
    assert not nothing.mask.any()
    assert torch.equal(nothing.weight, torch.zeros_like(w))
