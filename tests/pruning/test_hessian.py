"""The damped factor of a Hessian, and the score w²/[H⁻¹]_jj, against plain inverses."""

import numpy as np
import pytest
import torch
from torch import nn

from resu.pruning.hessian import factorise, saliency
from resu.pruning.importance import Stats, compute_layer_importance, importances
from tests.pruning.test_sparsegpt import kill, layer
from tests.reference import sparsegpt as reference


@pytest.mark.parametrize("columns", [1, 2, 17, 64])
def test_the_factor_gives_back_the_damped_hessian_and_its_inverse(columns):
    _, h = layer(1, columns)
    factor = factorise(h, damping=0.05)
    damped, _ = reference.damped(h.numpy(), 0.05)
    upper = factor.upper[0]
    assert torch.equal(upper, upper.triu())
    np.testing.assert_allclose((upper @ upper.T).numpy(), damped, rtol=0, atol=1e-12 * damped.max())
    inverse = np.diag(np.linalg.inv(damped))
    np.testing.assert_allclose(factor.inverse_diagonal()[0].numpy(), inverse, rtol=1e-8)
    # U = R⁻¹ is the upper Cholesky factor of the inverse.
    u = np.linalg.cholesky(np.linalg.inv(damped)).T
    np.testing.assert_allclose(torch.linalg.inv(upper).numpy(), u, rtol=0, atol=1e-8 * np.abs(u).max())


def test_dead_inputs_count_as_one_before_the_mean_is_taken():
    _, h = layer(1, 10)
    h = kill(h, 0, 7)
    factor = factorise(h)
    damped, dead = reference.damped(h.numpy())
    assert factor.dead[0].tolist() == dead.tolist()
    assert torch.allclose(factor.upper[0] @ factor.upper[0].T, torch.from_numpy(damped), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scores_are_those_of_the_paper(dtype):
    w, h = layer(6, 40, tokens=400)
    h = kill(h, 3)
    scores = importances["sparsegpt"](w.to(dtype), Stats(hessian=h.to(torch.promote_types(dtype, torch.float32))))
    expected = reference.obs_score(w.to(dtype).double().numpy(), h.numpy())
    assert scores.dtype == torch.promote_types(dtype, torch.float32)
    np.testing.assert_allclose(scores.double().numpy(), expected, rtol=1e-9 if dtype == torch.float64 else 1e-4)
    assert bool((scores[:, 3] == 0).all())


def test_scores_say_what_least_squares_says():
    # Removing one weight and solving for all others costs exactly half the score, in H's ½ δ H δᵀ.
    w, h = layer(1, 12)
    scores = saliency(w, h, damping=0.0)
    for j in range(12):
        mask = np.arange(12)[None] != j
        best = reference.least_squares(w.numpy(), mask, h.numpy())
        assert float(scores[0, j]) / 2 == pytest.approx(reference.output_error(w.numpy(), best, h.numpy())[0], rel=1e-6)


def test_convolutions_and_stacked_experts_are_scored_by_their_matrix():
    w, h = layer(6, 24)
    flat = saliency(w, h)
    assert torch.equal(saliency(w.view(6, 6, 2, 2), h).flatten(1), flat)
    _, other = layer(6, 24, seed=9)
    both = saliency(torch.cat([w, w]), torch.stack([h, other]))
    assert torch.allclose(both[:6], flat)
    assert torch.allclose(both[6:], saliency(w, other))


def test_a_model_is_scored_from_batches():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x = torch.randn(50, 6, dtype=torch.float64)
    scores = compute_layer_importance(model, "sparsegpt", [x[:20], x[20:]])
    expected = saliency(model[0].weight.detach(), 2 / 50 * x.T @ x)
    assert torch.allclose(scores["0.weight"], expected)
    assert scores["2.weight"].shape == (3, 8)


def test_damping_is_raised_and_said_for_the_score_too():
    x = torch.randn(1, 64) * 100
    with pytest.warns(UserWarning, match="failed at damping 0; raised to"):
        scores = saliency(torch.randn(2, 64), 2 * x.T @ x, damping=0.0)
    assert bool(torch.isfinite(scores).all())


@pytest.mark.filterwarnings("ignore:a Hessian is 0 everywhere")
def test_an_expert_without_tokens_is_scored_by_magnitude():
    w, h = layer(2, 5)
    scores = saliency(torch.cat([w, w]), torch.stack([h, 0 * h]))
    assert torch.equal(scores[2:], w.square())
