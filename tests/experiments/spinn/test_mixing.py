"""Shares against a search over a fine grid, and the properties that make a mixture."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resu.experiments.spinn.mixing import best_single, mixture


def products(seed, tools, candidates, rows=6):
    make = torch.Generator().manual_seed(seed)
    for _ in range(tools):
        missed = torch.randn(candidates, rows, generator=make, dtype=torch.float64) * 10 ** torch.randn(
            1, generator=make
        )
        yield missed @ missed.T


def lost(shares, grams):
    return sum(float((shares @ g @ shares).log()) for g in grams)


@given(st.integers(0, 1000), st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_no_point_of_a_grid_is_better(seed, tools):
    grams = list(products(seed, tools, 3))
    found = mixture(grams)
    grid = (torch.tensor(p, dtype=torch.float64) / 40 for p in itertools.product(range(41), repeat=3) if sum(p) == 40)
    start = lost(torch.full((3,), 1 / 3, dtype=torch.float64), grams)
    best = min(lost(shares, grams) for shares in grid)
    assert lost(found, grams) <= start
    if tools == 1:  # one tool: convex, so the best there is
        assert lost(found, grams) <= best + 1e-6


@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_shares_are_shares_and_no_tools_scale_matters(seed, tools, candidates):
    grams = list(products(seed, tools, candidates))
    found = mixture(grams)
    assert float(found.sum()) == pytest.approx(1)
    assert found.min() >= 0
    scaled = mixture([g * 7.0**k for k, g in enumerate(grams)])
    assert torch.allclose(found, scaled, atol=1e-5)


def test_errors_that_cancel_are_mixed_and_a_perfect_candidate_takes_all():
    missed = torch.tensor([[1.0, 1.0], [-3.0, -3.0], [5.0, -5.0]], dtype=torch.float64)
    assert torch.allclose(mixture([missed @ missed.T]), torch.tensor([0.75, 0.25, 0.0], dtype=torch.float64), atol=1e-3)
    missed[2] = 0
    assert mixture([missed @ missed.T])[2] > 0.2  # so does [0.75, 0.25, 0], and all between
    assert mixture([torch.diag(torch.tensor([1.0, 0.0, 2.0]))])[1] > 0.999


def test_the_best_single_one_is_by_the_geometric_mean():
    grams = [torch.diag(torch.tensor(d)) for d in ([1e-3, 9.0], [2.0, 3.0], [90.0, 80.0])]
    assert best_single(grams).tolist() == [1.0, 0.0]  # 0.18 against 2160
    grams[0] = torch.diag(torch.tensor([20.0, 9.0]))
    assert best_single(grams).tolist() == [0.0, 1.0]


def biased(seed, candidates=7, rows=30):
    """Errors of neighbours on a scale, as those of penalties are: much alike, with a bias that changes slowly."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    for _ in range(1 + seed % 5):
        end = 2 * float(torch.rand(1, generator=make)) - 1
        bias = normal(1) * torch.linspace(1, end, candidates, dtype=torch.float64)[:, None]
        own = 2 * torch.rand(candidates, 1, generator=make, dtype=torch.float64)
        missed = bias + 0.5 * normal(1, rows) + 0.3 * own * normal(candidates, rows)
        yield missed @ missed.T


@pytest.mark.parametrize("seed", range(26, 32))
def test_no_share_is_better_elsewhere(seed):
    """The first-order condition: a softmax alone leaves shares at 0 that should not be there."""
    grams = list(biased(seed))
    shares = mixture(grams)
    slope = sum(2 * g @ shares / (shares @ g @ shares) for g in grams)
    assert slope.min() > slope @ shares - 1e-3


def test_candidates_that_are_all_alike_and_errors_of_zero_have_equal_shares():
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    assert torch.allclose(mixture([torch.full((3, 3), 4.0)]), third)
    assert torch.allclose(mixture([torch.zeros(3, 3), torch.zeros(3, 3)]), third)


def test_input_no_tool_and_nan_are_refused():
    with pytest.raises(ValueError, match="at least one tool"):
        mixture([])
    with pytest.raises(ValueError, match="must be finite; is there a NaN in the recording"):
        mixture([torch.eye(3), torch.full((3, 3), float("nan"))])
