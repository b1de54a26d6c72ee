"""LAMP and OWL: against restatements of the papers, and what they refuse."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resu.core.counting import keep_count
from resu.pruning.allocation import allocate, allocations, ignores_scores, needs_scores, owl
from resu.pruning.allocation.outliers import block_of, outlier_share
from resu.pruning.mask_generator import MaskGenerator
from tests.reference import lamp as lamp_reference
from tests.reference import owl as owl_reference


def shapes_of(scores):
    return {name: s.shape for name, s in scores.items()}


def total_of(scores):
    return sum(s.numel() for s in scores.values())


numbers = st.one_of(st.integers(0, 4).map(float), st.floats(0, 8, width=32))
layers = st.lists(st.lists(numbers, min_size=1, max_size=9), min_size=1, max_size=5)


@settings(max_examples=150)
@given(layers=layers, digits=st.integers(0, 99))
def test_lamp_counts_are_those_of_the_papers_global_ranking(layers, digits):
    scores = {f"l{i}": torch.tensor([values]) for i, values in enumerate(layers)}
    if keep_count(total_of(scores), digits / 100) < len(layers):
        with pytest.raises(ValueError, match="fewer than the"):
            allocate("lamp", shapes_of(scores), digits / 100, scores)
        return
    expected = lamp_reference.global_masks(layers, digits / 100)
    keeps = allocate("lamp", shapes_of(scores), digits / 100, scores)
    assert list(keeps.values()) == [sum(mask) for mask in expected]


@settings(max_examples=30)
@given(layers=layers, digits=st.integers(0, 99), dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.int32]))
def test_lamp_of_narrow_scores_is_that_of_their_values(layers, digits, dtype):
    scores = {f"l{i}": torch.tensor([values]).to(dtype) for i, values in enumerate(layers)}
    for score in scores.values():
        if dtype.is_floating_point:
            score[score == 0] = -0.0
    if keep_count(total_of(scores), digits / 100) >= len(layers):
        wide = {name: score.double() for name, score in scores.items()}
        expected = allocate("lamp", shapes_of(wide), digits / 100, wide)
        assert allocate("lamp", shapes_of(scores), digits / 100, scores) == expected


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(7, 9), nn.Conv2d(3, 4, 2), nn.Linear(9, 5))


@pytest.mark.parametrize("sparsity", [0.3, 0.75, 0.95])
def test_lamp_as_a_score_and_as_a_distribution_give_the_papers_masks(sparsity):
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model[0].weight *= 20  # a layer that magnitude alone would keep whole
    weights = {n: p.detach() for n, p in model.named_parameters() if p.ndim > 1}
    expected = lamp_reference.global_masks([w.abs().reshape(-1).tolist() for w in weights.values()], sparsity)
    for metric, distribution in [("lamp", "global"), ("magnitude", "lamp")]:
        masks = MaskGenerator(model, sparsity, "tensor", metric, distribution=distribution).generate_masks()
        for (name, mask), kept in zip(masks.items(), expected, strict=True):
            assert mask.reshape(-1).tolist() == kept, (metric, name)


def test_trap_07_lamp_counts_of_many_weights_do_not_drift():
    generator = torch.Generator().manual_seed(0)
    scores = {"a": torch.rand(1000, 1000, generator=generator), "b": 7 * torch.rand(1000, 1000, generator=generator)}
    keeps = allocate("lamp", shapes_of(scores), 0.5, scores)
    assert sum(keeps.values()) == 1_000_000
    # Each is the other's copy up to scale and draw, so that float64 sums divide the budget about evenly.
    assert abs(keeps["a"] - keeps["b"]) < 2000
    exact = [_exact_lamp(s) for s in scores.values()]
    threshold = np.sort(np.concatenate(exact))[1_000_000]
    assert list(keeps.values()) == [int((values >= threshold).sum()) for values in exact]


def _exact_lamp(scores):
    square = np.sort(scores.numpy().reshape(-1).astype(np.longdouble)) ** 2
    distinct, first = np.unique(square, return_index=True)
    tail = np.cumsum(square[::-1])[::-1]
    return (square / tail[first[np.searchsorted(distinct, square)]]).astype(np.float64)


def test_trap_09_lamp_empties_no_layer():
    # All equal: each scores 1/1000, below every weight of the other layer.
    scores = {"equal": torch.ones(10, 100), "steep": 2.0 ** torch.arange(10.0).view(1, 10)}
    assert allocate("lamp", shapes_of(scores), 0.995, scores) == {"equal": 1, "steep": 5}


@pytest.mark.parametrize("name", ["lamp", "owl"])
def test_scores_below_zero_are_refused_with_the_reason(name):
    scores = {"1.w": torch.tensor([[1.0, -2.0]])}
    with pytest.raises(ValueError, match=rf"distribution '{name}' .* go down to -2"):
        allocate(name, shapes_of(scores), 0.5, scores)


@pytest.mark.parametrize("name", ["lamp", "owl", "global"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_missing_or_not_finite_are_said(name, bad):
    with pytest.raises(ValueError, match=r"looks at the scores of all layers together; none given for \['a'\]"):
        allocate(name, {"a": torch.Size([2, 2])}, 0.5)
    with pytest.raises(ValueError, match="hold 1 NaN or infinite"):
        allocate(name, {"a": torch.Size([1, 2])}, 0.5, {"a": torch.tensor([[1.0, bad]])})


# -- OWL -----------------------------------------------------------------------------------------------


def transformer(blocks=4, seed=0, spread=3.0):
    """Scores with heavier tails in some blocks; blocks differ in size."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for i in range(blocks):
        tail = 1 + spread * (i % 3)
        for layer, shape in {"attn.q": (16, 16), "mlp.up": (40 + 8 * i, 16)}.items():
            x = torch.randn(shape, generator=generator, dtype=torch.float64).abs()
            scores[f"model.layers.{i}.{layer}.weight"] = x**tail
    return scores | {"head.weight": torch.rand(8, 16, generator=generator, dtype=torch.float64)}


def papers_owl(scores, sparsity, m, lam):
    members = {}
    for name, score in scores.items():
        parts = name.split(".")
        members.setdefault(".".join(parts[:3]) if parts[0] == "model" else name, []).append((name, score.numpy()))
    shares = {b: owl_reference.outlier_share([s for _, s in one], m) for b, one in members.items()}
    sizes = {b: sum(s.size for _, s in one) for b, one in members.items()}
    density = owl_reference.densities(shares, sizes, sparsity, lam)
    return {name: density[b] for b, one in members.items() for name, _ in one}


@pytest.mark.parametrize("m", [3.0, 5.0, 7.5])
@pytest.mark.parametrize("lam", [0.02, 0.08, 0.2])
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_owl_densities_are_the_papers(m, lam, sparsity):
    scores = transformer()
    expected = papers_owl(scores, sparsity, m, lam)
    assert len(set(expected.values())) > 2
    keeps = allocate(owl(M=m, lam=lam), shapes_of(scores), sparsity, scores)
    assert sum(keeps.values()) == keep_count(total_of(scores), sparsity)
    for name, keep in keeps.items():
        assert abs(keep - expected[name] * scores[name].numel()) < 1.001, name


def test_owl_by_name_has_the_papers_options():
    scores = transformer(seed=3)
    assert allocate("owl", shapes_of(scores), 0.6, scores) == allocate(
        owl(M=5, lam=0.08), shapes_of(scores), 0.6, scores
    )


def test_owl_of_one_block_or_without_outliers_is_uniform():
    one = {k: v for k, v in transformer().items() if ".1." in k}
    flat = {k: torch.ones_like(v) for k, v in transformer().items()}
    for scores in (one, flat):
        shapes = shapes_of(scores)
        assert allocate("owl", shapes, 0.7, scores) == allocate("uniform", shapes, 0.7)


@settings(max_examples=40)
@given(digits=st.integers(1, 99), lam=st.sampled_from([0.0, 0.1, 0.3, 0.49]), seed=st.integers(0, 5))
def test_owl_totals_are_exact_where_densities_are_clipped(digits, lam, seed):
    scores = transformer(seed=seed)
    keeps = allocate(owl(lam=lam), shapes_of(scores), digits / 100, scores)
    assert sum(keeps.values()) == keep_count(total_of(scores), digits / 100)
    assert all(1 <= keep <= scores[name].numel() for name, keep in keeps.items())
    # More outliers never keep a smaller share, up to the rounding of a small layer.
    share = {
        b: float(outlier_share([s for n, s in scores.items() if block_of(n) == b], 5)) for b in map(block_of, scores)
    }
    names = sorted(scores, key=lambda n: share[block_of(n)])
    kept = [keeps[n] / scores[n].numel() for n in names]
    for low, high, a, b in zip(kept, kept[1:], names, names[1:], strict=False):
        slack = 2 / scores[a].numel() + 2 / scores[b].numel()
        assert low <= high + slack


def test_owl_with_blocks_of_ones_own():
    scores = {"a.w": torch.ones(10, 10), "b.w": torch.ones(10, 10)}
    scores["b.w"][0, 0] = 50
    assert allocate(owl(lam=0.1), shapes_of(scores), 0.5, scores) == {"a.w": 40, "b.w": 60}
    assert allocate(owl(lam=0.1, blocks=lambda name: "all"), shapes_of(scores), 0.5, scores) == {"a.w": 50, "b.w": 50}


@pytest.mark.parametrize("options", [{"M": 0}, {"M": -1.0}, {"lam": -0.1}, {"lam": 0.5}, {"M": math.nan}])
def test_owl_options_out_of_range(options):
    with pytest.raises(ValueError, match=r"must be positive|must lie in \[0, 0.5\)"):
        owl(**options)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3"),
        ("transformer.h.11.mlp.c_fc.weight", "transformer.h.11"),
        ("layer1.0.conv1.weight", "layer1.0"),
        ("0.weight", "0"),
        ("fc1.weight", "fc1.weight"),
    ],
)
def test_blocks_are_read_from_names(name, block):
    assert block_of(name) == block


def test_owl_options_that_are_no_numbers():
    with pytest.raises(TypeError, match=r"lam must be a number, got '0.1'"):
        owl(lam="0.1")


# -- which look at scores ------------------------------------------------------------------------------


def test_which_distributions_look_at_scores():
    assert {name for name in allocations if needs_scores(name)} == {"global", "lamp", "owl"}
    assert not needs_scores(None)
    assert not needs_scores({"*": 0.5})
    assert needs_scores(lambda shapes, sparsity, scores: {})
    assert needs_scores(owl(lam=0.1))
    assert not needs_scores(ignores_scores(lambda shapes, sparsity, scores: {}))
    with pytest.raises(ValueError, match="unknown distribution 'owwl'; known: er, erk"):
        needs_scores("owwl")
