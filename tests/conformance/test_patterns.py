"""Every registered pattern × scores of many shapes × sparsities: what all patterns promise."""

import pytest
import torch

from resu.core.pattern import NM, get_pattern, patterns
from resu.pruning.importance import Stats, importances

SHAPES = [(8,), (1, 1), (16, 16), (7, 13), (33, 2), (8, 4, 3, 3), (5, 3, 2, 2)]
SPARSITIES = [0.0, 0.29, 0.5, 0.75, 0.9, 0.99]


@pytest.fixture(params=patterns)
def pattern(request):
    return patterns[request.param]()


def cases(pattern):
    for shape in SHAPES:
        for sparsity in [pattern.sparsity] if isinstance(pattern, NM) else SPARSITIES:
            yield shape, sparsity


def scores_of(shape, kind="normal"):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    return {"normal": x, "equal": torch.zeros(shape), "coarse": x.round(), "minus zero": -torch.zeros(shape)}[kind]


@pytest.mark.parametrize("kind", ["normal", "equal", "coarse", "minus zero"])
def test_masks_are_legal_counted_and_repeat(pattern, kind):
    for shape, sparsity in cases(pattern):
        scores = scores_of(shape, kind)
        before = scores.clone()
        mask = pattern.mask(scores, sparsity)
        assert mask.dtype == torch.bool
        assert mask.shape == scores.shape
        assert mask.any()
        assert pattern.violations(mask) == 0
        assert torch.equal(mask, pattern.mask(scores, sparsity))
        assert torch.equal(scores, before)
        keep = pattern.keep_for(shape, sparsity)
        assert 1 <= keep <= scores.numel()
        assert pattern.reachable(shape, keep) == keep
        whole = not hasattr(pattern, "h") or (shape[0] % pattern.h == 0 and len(shape) > 1)
        if whole:  # else the count depends on which short blocks win
            assert int(mask.sum()) == keep
        assert torch.equal(mask, pattern.select(scores, keep))


@pytest.mark.parametrize("pattern", [name for name in patterns if name != "nm"], indirect=True)  # has one sparsity
def test_dense_stays_dense(pattern):
    for shape in SHAPES:
        assert pattern.mask(scores_of(shape), 0.0).all()
        assert pattern.select(scores_of(shape), torch.Size(shape).numel()).all()


def test_better_scores_never_lose_to_worse_ones_of_their_kind(pattern):
    """Raising the scores of all kept positions changes nothing."""
    for shape, sparsity in cases(pattern):
        scores = scores_of(shape)
        mask = pattern.mask(scores, sparsity)
        assert torch.equal(pattern.mask(scores + 5.0 * mask, sparsity), mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_dtype(pattern, dtype):
    for shape, sparsity in cases(pattern):
        scores = scores_of(shape, "coarse")  # exact in every dtype
        assert torch.equal(pattern.mask(scores.to(dtype), sparsity), pattern.mask(scores, sparsity))


def test_strided_scores_are_scores(pattern):
    for sparsity in [pattern.sparsity] if isinstance(pattern, NM) else SPARSITIES:
        scores = scores_of((12, 16)).t()
        assert torch.equal(pattern.mask(scores, sparsity), pattern.mask(scores.contiguous(), sparsity))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_input_nan_is_refused(pattern, bad):
    scores = scores_of((16, 16))
    scores[3, 3] = bad
    with pytest.raises(ValueError, match="scores hold 1 NaN or infinite"):
        pattern.mask(scores, 0.5)


@pytest.mark.parametrize("bad", [-0.1, 1.0, float("nan"), "0.5"])
def test_input_sparsity_is_checked(pattern, bad):
    with pytest.raises((ValueError, TypeError), match="sparsity"):
        pattern.mask(scores_of((16, 16)), bad)


def test_names_and_objects_are_one(pattern):
    assert get_pattern(pattern) is pattern
    assert get_pattern(next(name for name in patterns if isinstance(pattern, patterns[name]))) == pattern


@pytest.mark.parametrize("name", importances)
def test_every_importance_feeds_every_pattern(pattern, name):
    importance = importances[name]
    for shape in [(16, 16), (16, 8, 3, 3)]:
        weight = torch.randn(shape)
        grad = torch.randn(shape)
        stats = Stats(
            grad=grad,
            grad_squared=grad.square(),
            input_norm=torch.rand(shape[1:]),
            hessian=torch.eye(weight[0].numel()),
            generator=torch.Generator().manual_seed(0),
        )
        before = weight.clone()
        scores = importance(weight, stats)
        assert scores.shape == weight.shape
        assert scores.is_floating_point()
        assert not scores.requires_grad
        assert torch.isfinite(scores).all()
        assert torch.equal(weight, before)
        assert pattern.violations(pattern.mask(scores, 0.5)) == 0


@pytest.mark.parametrize("name", importances)
def test_every_importance_says_what_it_lacks(name):
    importance = importances[name]
    if not importance.needs:
        assert importance(torch.randn(2, 3)).shape == (2, 3)
        return
    with pytest.raises(ValueError, match=f"importance '{name}' needs"):
        importance(torch.randn(2, 3))


@pytest.mark.parametrize("name", importances)
def test_every_importance_takes_half_precision(name):
    weight = torch.randn(4, 6).to(torch.bfloat16)
    stats = Stats(grad=weight, grad_squared=weight.float().square(), input_norm=torch.rand(6), hessian=torch.eye(6))
    assert torch.isfinite(importances[name](weight, stats)).all()
