"""Every registered score × every distribution × every pattern, on a model with every way a weight is stored."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from resu.core.counting import keep_count
from resu.core.layers import select
from resu.core.pattern import NM, get_pattern, patterns
from resu.pruning.allocation import allocations
from resu.pruning.importance import compute_layer_importance, importances, register_importance
from resu.pruning.mask_generator import MaskGenerator
from tests.core.test_layers import Conv1D

SPARSITY = 0.5  # that of 2:4 and of 4:8


class GPT2Layer(Conv1D):
    def forward(self, x):
        return x @ self.weight + self.bias


class FusedExperts(nn.Module):
    is_transposed = True

    def __init__(self, experts, inputs, out):
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, inputs, out))

    def forward(self, x):
        return torch.stack([x @ expert for expert in self.up]).sum(0)


class EveryKind(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 2)
        self.fc = nn.Linear(32, 12)
        self.c_fc = GPT2Layer(8, 12)
        self.experts = nn.ModuleList([FusedExperts(3, 8, 12)])
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        x = torch.relu(self.fc(self.conv(x).flatten(1)))
        return self.head(self.experts[0](torch.relu(self.c_fc(x))))


def network():
    torch.manual_seed(0)
    return EveryKind()


def data():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(40, 4, 3, 3, generator=generator), torch.randint(0, 2, (40,), generator=generator))]


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


INCLUDE = ["conv", "fc", "c_fc", "experts.0", "head"]
NAMES = ["conv.weight", "fc.weight", "c_fc.weight", "experts.0.up", "head.weight"]
PATTERNS = ["unstructured", "row", "tensor", "2:4", "4:8", "block:2x2", "block:1x4", "channel:0", "channel:1"]
DISTRIBUTIONS = [None, *allocations, {"fc": 0.5, "*": 0.5}, lambda shapes, sparsity, scores: dict.fromkeys(shapes, 5)]


def test_the_patterns_here_are_all_there_are():
    assert {type(get_pattern(p)) for p in PATTERNS} == {patterns[name] for name in patterns}


def generator_of(model, score, method, distribution, **options):
    by_layer = isinstance(distribution, dict)
    return MaskGenerator(
        model,
        distribution if by_layer else SPARSITY,
        method,
        score,
        distribution=None if by_layer else distribution,
        include=INCLUDE,
        dataloader=data(),
        loss_fn=loss,
        **options,
    )


@pytest.mark.parametrize("method", PATTERNS)
@pytest.mark.parametrize("score", importances)
def test_masks_are_legal_counted_and_repeat_and_the_model_is_untouched(score, method):
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for distribution in DISTRIBUTIONS:
        divided = distribution is not None and not isinstance(distribution, dict)
        if divided and isinstance(get_pattern(method), NM):
            with pytest.raises(ValueError, match=r"keeps .* in every layer, so there is nothing for distribution="):
                generator_of(model, score, method, distribution)
            continue
        generator = generator_of(model, score, method, distribution)
        masks = generator.generate_masks()
        assert list(masks) == NAMES
        check_counts(masks, model, generator.pattern, distribution)
        if distribution in (None, "global"):
            again = generator_of(model, score, method, distribution).generate_masks()
            assert all(torch.equal(again[name], mask) for name, mask in masks.items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def check_counts(masks, model, pattern, distribution):
    layers = select(model, INCLUDE)
    seen = {name: layers[name].matrix(mask) for name, mask in masks.items()}
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    for name, mask in masks.items():
        assert mask.dtype == torch.bool
        assert mask.shape == model.get_parameter(name).shape
        assert mask.is_contiguous()
        assert kept[name] >= 1
        assert pattern.violations(seen[name]) == 0, name
    if distribution is None or isinstance(distribution, dict):
        assert kept == {name: pattern.keep_for(matrix.shape, SPARSITY) for name, matrix in seen.items()}
        return
    if callable(distribution):
        assert kept == {name: pattern.reachable(matrix.shape, 5) for name, matrix in seen.items()}
        return
    total = keep_count(sum(m.numel() for m in masks.values()), SPARSITY)
    # Whole blocks or channels: at most one less per layer, and one at least.
    units = {name: math.ceil(m.numel() / parts(pattern, m.shape)) for name, m in seen.items()}
    assert total - sum(units.values()) < sum(kept.values()) <= total + sum(units.values())
    if max(units.values()) == 1:
        assert sum(kept.values()) == total


def parts(pattern, shape):
    if hasattr(pattern, "h"):
        return math.ceil(shape[0] / pattern.h) * math.ceil(math.prod(shape[1:]) / pattern.w)
    return shape[pattern.dim] if hasattr(pattern, "dim") else math.prod(shape)


@pytest.mark.parametrize("score", importances)
def test_what_stays_scores_no_less_than_what_goes(score):
    """Positions, not counts: within each unit of comparison the kept ones are the best."""
    model = network()
    layers = select(model, INCLUDE)
    scores = compute_layer_importance(model, score, data(), loss_fn=loss, include=INCLUDE)
    scores = {name: layers[name].matrix(s) for name, s in scores.items()}

    def masks(method, distribution=None):
        found = generator_of(model, score, method, distribution).generate_masks()
        return {name: layers[name].matrix(mask) for name, mask in found.items()}

    for name, mask in masks("tensor").items():
        assert scores[name][mask].min() >= scores[name][~mask].max()
    for name, mask in masks("row").items():
        for row, kept in zip(scores[name].flatten(1), mask.flatten(1), strict=True):
            assert row[kept].min() >= row[~kept].max()
    for name, mask in masks("2:4").items():
        columns = scores[name].movedim(1, -1), mask.movedim(1, -1)
        for start in range(0, columns[0].shape[-1], 4):
            for group, kept in zip(*(c[..., start : start + 4].flatten(0, -2) for c in columns), strict=True):
                assert not kept.all() or len(kept) <= 2
                if not kept.all():
                    assert group[kept].min() >= group[~kept].max()
    together = masks("tensor", "global")
    best = torch.cat([scores[n][m] for n, m in together.items() if m.sum() > 1])
    rest = torch.cat([scores[n][~m] for n, m in together.items()])
    assert best.min() >= rest.max()


def test_a_score_of_ones_own_goes_with_everything():
    shapes = set()

    @register_importance("mine", needs={"inputs", "grads"}, scope="row")
    def mine(weight, stats):
        shapes.add(tuple(weight.shape))
        assert stats.input_norm is not None
        assert stats.generator is not None
        return (weight * stats.grad).abs() + torch.rand(weight.shape, generator=stats.generator)

    try:
        model = network()
        for method, distribution in itertools.product(["unstructured", "block:2x2"], DISTRIBUTIONS):
            generator = generator_of(model, "mine", method, distribution)
            check_counts(generator.generate_masks(), model, generator.pattern, distribution)
        assert shapes == {(8, 4, 2, 2), (12, 32), (8, 12), (12, 8), (2, 12)}  # an expert at a time, outputs first
        assert MaskGenerator(model, 0.5, importance_metric="mine", include="fc").pattern.scope == "row"
    finally:
        del importances._items["mine"]
