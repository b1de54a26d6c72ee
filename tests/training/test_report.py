"""Reports against counting by hand: multiplications, positions ever active, positions grown."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from resu.core.layers import select
from resu.training import Sparsifier, Static
from resu.training.algorithms import ACDC, MEST, SET, SNFS, STE, GraNet, Magnitude, RigL, SRigL, TopKAST
from resu.training.flops import uses_per_pass
from tests.training.helpers import batches, fit, mlp

X = torch.zeros


class Cross(nn.Module):
    """Queries of one length, keys and values of another."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, query, key, value):
        return self.attention(query, key, value=value)[0]


# What a model does with one batch: {weight: how often each of its elements is multiplied}, written out by hand.
CASES = {
    "linear layers": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)),
        X(5, 6),
        {"0.weight": 5, "2.weight": 5},
    ),
    "tokens": (lambda: nn.Sequential(nn.Linear(6, 4)), X(2, 7, 6), {"0.weight": 2 * 7}),
    # 9 x 9 with padding 1, kernel 3, stride 2: 5 x 5 places; then 5 x 5, kernel 2: 4 x 4.
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.Conv2d(6, 2, 2), nn.Flatten(), nn.Linear(32, 3)
        ),
        X(2, 4, 9, 9),
        {"0.weight": 2 * 25, "1.weight": 2 * 16, "3.weight": 2},
    ),
    "one dimension": (lambda: nn.Sequential(nn.Conv1d(3, 5, 3, dilation=2)), X(4, 3, 11), {"0.weight": 4 * 7}),
    # Each place of the input is spread over a kernel's places of the output.
    "transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)),
        X(2, 4, 5, 6),
        {"0.weight": 2 * 5 * 6},
    ),
    "self-attention": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        X(2, 5, 8),
        {"self_attn.in_proj_weight": 10, "self_attn.out_proj.weight": 10, "linear1.weight": 10, "linear2.weight": 10},
    ),
    # A third of the rows projects the queries, two thirds keys and values.
    "cross-attention": (
        Cross,
        (X(2, 5, 8), X(2, 7, 8), X(2, 7, 8)),
        {"attention.in_proj_weight": (2 * 5 + 2 * 2 * 7) / 3, "attention.out_proj.weight": 10},
    ),
    "attention of other widths": (
        lambda: Cross(kdim=6, vdim=4),
        {"query": X(2, 5, 8), "key": X(2, 7, 6), "value": X(2, 7, 4)},
        {
            "attention.q_proj_weight": 10,
            "attention.k_proj_weight": 14,
            "attention.v_proj_weight": 14,
            "attention.out_proj.weight": 10,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_multiplications_are_those_counted_by_hand(case):
    make, inputs, by_hand = CASES[case]
    model = make().train()
    assert uses_per_pass(model, select(model), inputs) == by_hand
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, Static(sparsity=0.5), distribution="uniform")
    report = sparsifier.report(inputs)
    masks = sparsifier.masks
    kept = sum(by_hand[name] * mask.n_active for name, mask in masks.items())
    dense = sum(by_hand[name] * mask.numel for name, mask in masks.items())
    assert report.inference_flops == pytest.approx(kept / dense, rel=1e-12)
    assert report.training_flops is None  # no step yet
    assert sparsifier.report().inference_flops is None  # no inputs to count with
    assert "inference FLOPs" in str(report)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(self.layer(x))


def test_a_layer_that_is_used_twice_counts_twice():
    model = Shared()
    assert uses_per_pass(model, select(model), X(5, 6)) == {"layer.weight": 10}


def test_the_mode_of_each_module_is_put_back_also_after_an_error():
    model = nn.Sequential(nn.Linear(6, 4), nn.Dropout(), nn.Linear(4, 3))
    model[1].eval()
    with pytest.raises(RuntimeError):
        uses_per_pass(model, select(model), X(5, 7))
    assert model.training
    assert not model[1].training
    assert not any(m._forward_hooks for m in model.modules())


STEPS = 13
RULES = {
    "static": Static(sparsity=0.8),
    "static-late": Static(sparsity=0.8, begin_step=5),
    "magnitude": Magnitude(sparsity=0.8, begin_step=2, end_step=10, interval=3),
    "set": SET(sparsity=0.8, interval=3, end_step=10),
    "mest": MEST(sparsity=0.8, interval=3, end_step=10),
    "mest-soft": MEST(sparsity=0.8, interval=3, end_step=10, soft=True),
    "rigl": RigL(sparsity=0.8, interval=3, end_step=10),
    "srigl": SRigL(sparsity=0.8, interval=3, end_step=10),
    "granet": GraNet(sparsity=0.8, interval=3, end_step=10),
    "snfs": SNFS(sparsity=0.8, interval=3, end_step=10),
    "ste": STE(sparsity=0.8, end_step=9),
    "top-kast": TopKAST(sparsity=0.8, interval=3, backward_sparsity=0.5, end_step=10),
    "ac-dc": ACDC(sparsity=0.8, interval=3, begin_step=2, end_step=8),
}


def gradient_taken(name, step, numel, kept):
    """Weights whose gradient the ``step``-th step (from 1) needs, as the rule's card says."""
    if name in ("rigl", "srigl"):
        return numel if step in (3, 6, 9) else kept
    if name == "granet":
        return numel if step in (3, 6, 9, 10) else kept
    if name == "snfs":
        return numel if step <= 10 else kept
    if name == "ste":
        return numel if step <= 9 else kept
    if name == "top-kast":  # half of the weights, where the layer's forward has a fifth
        return round(kept * 2.5) if step <= 10 else kept
    return kept


@pytest.mark.parametrize("name", RULES)
def test_training_flops_explored_and_grown_against_counting_by_hand(name):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pattern = "row" if name == "srigl" else None
    sparsifier = Sparsifier(model, optimizer, RULES[name], distribution="uniform", pattern=pattern)
    data = batches(STEPS)
    layers = list(sparsifier.layers)
    uses = dict.fromkeys(layers, 16)
    work = dict.fromkeys(layers, 0)
    grown = dict.fromkeys(layers, 0)
    ever = {n: set(m.active_indices.tolist()) for n, m in sparsifier.masks.items()}
    for step in range(1, STEPS + 1):
        before = {n: set(m.active_indices.tolist()) for n, m in sparsifier.masks.items()}
        for n in layers:
            numel = sparsifier.masks[n].numel
            work[n] += 2 * len(before[n]) + gradient_taken(name, step, numel, len(before[n]))
        fit(model, optimizer, data, step - 1, step)
        last = {}
        for n, m in sparsifier.masks.items():
            now = set(m.active_indices.tolist())
            last[n] = len(now - before[n])
            grown[n] += last[n]
            ever[n] |= now
        report = sparsifier.report(data[0][0])
        if RULES[name].due(step):
            assert {layer.name: layer.grown for layer in report.layers} == last
        for layer in report.layers:
            assert layer.explored == len(ever[layer.name]) / layer.numel
            assert layer.churn == grown[layer.name] / layer.keep
            assert layer.uses == uses[layer.name]
        numels = {layer.name: layer.numel for layer in report.layers}
        assert report.explored == pytest.approx(sum(map(len, ever.values())) / sum(numels.values()), rel=1e-12)
        dense = sum(3 * step * uses[n] * numels[n] for n in layers)
        by_hand = float(Fraction(sum(uses[n] * work[n] for n in layers), dense))
        assert report.training_flops == pytest.approx(by_hand, rel=1e-12)
        kept = {n: m.n_active for n, m in sparsifier.masks.items()}
        assert report.inference_flops == pytest.approx(
            sum(uses[n] * kept[n] for n in layers) / sum(uses[n] * numels[n] for n in layers), rel=1e-12
        )
    assert math.prod(report.layers[0].shape) == report.layers[0].numel
    plain = report.as_dict()
    assert plain["training_flops"] == report.training_flops
    assert plain["layers"][0]["update_share"] == pytest.approx(report.layers[0].update_share)


def test_flops_weigh_layers_by_their_use():
    """A convolution that is used often and pruned, a linear layer that is used once and dense."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, Static(sparsity=0.5), distribution={"0": 0.5})
    # 36 weights at 16 places and 320 at one: (18·16 + 320) / (36·16 + 320)
    assert sparsifier.report(X(1, 1, 6, 6)).inference_flops == pytest.approx(608 / 896, rel=1e-12)


def test_counters_go_on_after_a_resume():
    reports = []
    for cut in (None, 7):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        sparsifier = Sparsifier(model, optimizer, RULES["top-kast"])
        data = batches(STEPS)
        if cut is None:
            fit(model, optimizer, data)
        else:
            fit(model, optimizer, data, 0, cut)
            saved = model.state_dict(), optimizer.state_dict(), sparsifier.state_dict()
            model = mlp()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            sparsifier = Sparsifier(model, optimizer, RULES["top-kast"])
            for one, state in zip((model, optimizer, sparsifier), saved, strict=True):
                one.load_state_dict(state)
            fit(model, optimizer, data, cut)
        reports.append(sparsifier.report(data[0][0]).as_dict())
    assert reports[0] == reports[1]
