import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resu.core.selective import (
    SelectionConfig,
    consistency,
    select,
    selective_update_,
    share,
    update_averages_,
)
from tests.reference.selective import update


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1, 7, 200])
def test_update_equals_reference_elementwise(seed, size):
    generator = torch.Generator().manual_seed(seed)
    config = SelectionConfig(k_screen_ratio=0.6, k_select_ratio=0.25, tau_stable=0.3)
    theta = torch.randn(size, dtype=torch.float64, generator=generator)
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    expected, em, ev = theta.tolist(), m.tolist(), v.tolist()
    for _ in range(6):
        grad = torch.randn(size, dtype=torch.float64, generator=generator)
        before = theta.clone()
        stats = selective_update_(theta, grad, m, v, config, lr=0.1, weight_decay=0.05)
        expected, em, ev, chosen = update(
            expected, grad.tolist(), em, ev, beta=0.9, delta=1e-8, tau=0.3, k_screen=0.6, k_select=0.25,
            lr=0.1, weight_decay=0.05,
        )  # fmt: skip
        torch.testing.assert_close(theta, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(m, torch.tensor(em, dtype=torch.float64), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(v, torch.tensor(ev, dtype=torch.float64), rtol=1e-12, atol=1e-14)
        assert (theta != before).nonzero().view(-1).tolist() == chosen
        assert stats.n_selected == len(chosen)
        assert stats.selection_ratio == len(chosen) / size


def test_ties_go_to_the_lower_index():
    grad = torch.ones(10)
    config = SelectionConfig(k_screen_ratio=0.5, k_select_ratio=0.2)
    assert select(grad, torch.ones(10), config).tolist() == [0, 1]


def test_selection_may_be_smaller_than_its_limit():
    config = SelectionConfig(k_screen_ratio=0.5, k_select_ratio=0.5)
    stable = torch.tensor([0.9, 0.1, 0.9, 0.9])
    # |g| screens 0 and 1; only 0 is consistent.
    assert select(torch.tensor([4.0, 3.0, 2.0, 1.0]), stable, config).tolist() == [0]


@given(st.integers(0, 500), st.integers(1, 100))
def test_share_is_an_exact_ceiling(n, percent):
    assert share(n, percent / 100) == -(-n * percent // 100)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 100), st.integers(1, 100), st.integers(0, 2**32 - 1), st.booleans())
def test_selected_counts_and_order(n, screen, chosen, seed, ties):
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(n, generator=generator)
    if ties:
        grad = grad.round()
    stable = torch.rand(n, generator=generator)
    config = SelectionConfig(k_screen_ratio=screen / 100, k_select_ratio=chosen / 100)
    index = select(grad, stable, config)
    order = sorted(range(n), key=lambda i: (-abs(float(grad[i])), i))
    screened = order[: math.ceil(n * screen / 100 - 1e-9)]
    expected = [i for i in screened if stable[i] > 0.5][: share(n, chosen / 100)]
    assert index.tolist() == sorted(expected)


def test_consistency_is_one_for_a_constant_sign_and_small_for_noise():
    m, v = torch.zeros(2), torch.zeros(2)
    for step in range(50):
        update_averages_(m, v, torch.tensor([1.0, (-1.0) ** step]), 0.9)
    c = consistency(m, v, 1e-8)
    assert c[0] > 0.99
    assert c[1] < 0.1


def test_low_precision_theta_is_updated_through_wide_averages():
    theta = torch.ones(4, dtype=torch.bfloat16)
    m, v = torch.zeros(4), torch.zeros(4)
    selective_update_(theta, torch.ones(4, dtype=torch.bfloat16), m, v, SelectionConfig(k_select_ratio=1.0,
                      k_screen_ratio=1.0), lr=0.5)  # fmt: skip
    assert theta.dtype == torch.bfloat16
    assert torch.equal(theta.float(), torch.full((4,), 0.5))


def test_no_coordinates():
    empty = torch.empty(0)
    stats = selective_update_(empty, empty, empty.clone(), empty.clone(), SelectionConfig(), lr=0.1)
    assert stats.selection_ratio == 0.0


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("beta", 1.0, ValueError),
        ("beta", -0.1, ValueError),
        ("delta", 0.0, ValueError),
        ("tau_stable", 1.0, ValueError),
        ("k_screen_ratio", 0.0, ValueError),
        ("k_select_ratio", 1.5, ValueError),
        ("k_select_ratio", math.nan, ValueError),
        ("beta", "0.9", TypeError),
        ("beta", True, TypeError),
    ],
)
def test_config_refuses(field, value, error):
    with pytest.raises(error, match=field):
        SelectionConfig(**{field: value})


def test_config_is_frozen_and_knows_its_keys():
    with pytest.raises(AttributeError):
        SelectionConfig().beta = 0.5  # type: ignore[misc]
    with pytest.raises(TypeError, match="momentum"):
        SelectionConfig(momentum=0.9)  # type: ignore[call-arg]
