"""Wanda, RIA and LAMP, position by position against restatements of the papers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from resu.core.layers import select
from resu.core.pattern import NM
from resu.pruning.importance import Stats, compute_layer_importance, importances, score_layer
from resu.pruning.mask_generator import MaskGenerator
from tests.core.test_layers import Conv1D as BareConv1D
from tests.reference import lamp, ria, wanda

REFERENCES = {"wanda": wanda.scores, "ria": ria.scores}


class Conv1D(BareConv1D):
    def forward(self, x):
        return x @ self.weight + self.bias


class Experts(nn.Module):
    """A stack whose experts each see every token, ``[experts, out, in]`` or, transposed, ``[experts, in, out]``."""

    def __init__(self, experts, out, inputs, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(experts, *((inputs, out) if is_transposed else (out, inputs))))

    def forward(self, x):
        up = self.up if self.is_transposed else self.up.transpose(1, 2)
        return torch.stack([x @ expert for expert in up])


def of_kind(kind, out, inputs):
    """A layer of one kind and how its weight is read as ``[out, in]`` matrices."""
    if kind == "linear":
        return nn.Linear(inputs, out).double(), lambda w: [w]
    if kind == "conv1d":
        return Conv1D(out, inputs).double(), lambda w: [w.t()]
    transposed = kind == "transposed stack"
    return Experts(3, out, inputs, transposed).double(), lambda w: list(w.transpose(1, 2) if transposed else w)


KINDS = ["linear", "conv1d", "stack", "transposed stack"]


class Holder(nn.Sequential):
    pass


def masks_of(model, name, x, **options):
    options = {"include": "0*"} | options
    return MaskGenerator(Holder(model), importance_metric=name, dataloader=[x], **options).generate_masks()


def numpy(x):
    return x.detach().numpy()


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(out=st.integers(1, 7), inputs=st.integers(2, 13), digits=st.integers(0, 99), seed=st.integers(0, 999))
def test_trap_11_and_12_rows_of_every_layout_are_those_of_the_paper(name, kind, out, inputs, digits, seed):
    torch.manual_seed(seed)
    layer, matrices = of_kind(kind, out, inputs)
    weight = next(layer.parameters())
    if len(set(weight.shape)) > 1 and kind != "linear" and min(weight.shape) < 2:
        return  # a stack with a dimension of 1 is none
    x = torch.randn(9, inputs, dtype=torch.float64)
    (mask,) = masks_of(layer, name, x, sparsity=digits / 100, method="row").values()
    assert mask.shape == weight.shape
    assert mask.is_contiguous()
    for matrix, kept in zip(matrices(weight), matrices(mask), strict=True):
        scores = REFERENCES[name](numpy(matrix), numpy(x))
        assert np.array_equal(numpy(kept), wanda.by_row(scores, digits / 100))


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8)])
def test_n_of_m_of_every_layout_is_that_of_the_paper(name, kind, n, m):
    torch.manual_seed(n)
    layer, matrices = of_kind(kind, 5, 19)  # the last group of inputs is short
    x = torch.randn(9, 19, dtype=torch.float64)
    (mask,) = masks_of(layer, name, x, sparsity=None, method=f"{n}:{m}").values()
    for matrix, kept in zip(matrices(next(layer.parameters())), matrices(mask), strict=True):
        scores = REFERENCES[name](numpy(matrix), numpy(x))
        assert np.array_equal(numpy(kept), wanda.n_of_m(scores, n, m))


@pytest.mark.parametrize("name", REFERENCES)
def test_convolutions_are_scored_by_what_they_unfold(name):
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 5, 3).double()
    x = torch.randn(2, 6, 5, 6, dtype=torch.float64)
    weight, patches = numpy(layer.weight), wanda.unfolded(numpy(x), 3)
    scores = REFERENCES[name](weight.reshape(5, -1), patches)
    (rows,) = masks_of(layer, name, x, sparsity=0.6, method="row").values()
    assert np.array_equal(numpy(rows).reshape(5, -1), wanda.by_row(scores, 0.6))
    (groups,) = masks_of(layer, name, x, sparsity=0.5, method="2:4").values()
    by_place = scores.reshape(5, 6, 9).transpose(0, 2, 1).reshape(5 * 9, 6)  # M consecutive channels at each place
    expected = wanda.n_of_m(by_place, 2, 4).reshape(5, 9, 6).transpose(0, 2, 1)
    assert np.array_equal(numpy(groups).reshape(5, 6, 9), expected)


def test_ria_of_a_grouped_convolution_sums_the_columns_of_its_own_group():
    torch.manual_seed(1)
    layer = nn.Conv1d(6, 4, 1, groups=2).double()
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    scores = compute_layer_importance(Holder(layer), "ria", [x])["0.weight"].squeeze(-1)
    for group in (0, 1):
        seen = numpy(x[:, 3 * group : 3 * group + 3].transpose(1, 2).reshape(-1, 3))
        own = numpy(layer.weight[2 * group : 2 * group + 2, :, 0])
        assert np.allclose(numpy(scores[2 * group : 2 * group + 2]), ria.scores(own, seen), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", REFERENCES)
def test_scores_of_half_precision_weights_are_those_of_their_float32(name):
    torch.manual_seed(2)
    weight, x = torch.randn(6, 10).to(torch.bfloat16), torch.randn(30, 10)
    norm = x.norm(dim=0)
    found = importances[name](weight, Stats(input_norm=norm))
    assert found.dtype == torch.float32
    assert np.allclose(found.numpy(), REFERENCES[name](weight.double().numpy(), x.double().numpy()), rtol=1e-5)


def test_ria_of_empty_rows_and_columns_is_zero():
    weight = torch.zeros(3, 4)
    weight[1, 2] = 2.0
    score = importances["ria"](weight, Stats(input_norm=torch.ones(4)))
    assert score.tolist() == [[0, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0]]


def test_trap_01_ties_under_wanda_keep_exactly_the_count():
    layer = nn.Linear(8, 3)
    with torch.no_grad():
        layer.weight.fill_(0.5)
    (mask,) = masks_of(layer, "wanda", torch.ones(4, 8), sparsity=0.5).values()
    assert mask.tolist() == [[True] * 4 + [False] * 4] * 3


def test_trap_35_wanda_over_the_whole_layer_is_another_method():
    torch.manual_seed(3)
    layer, x = nn.Linear(64, 64).double(), torch.randn(128, 64, dtype=torch.float64) * torch.rand(64) ** 2
    with torch.no_grad():
        layer.weight *= torch.rand(64, 1) + 0.1
    (rows,) = masks_of(layer, "wanda", x, sparsity=0.5).values()
    (whole,) = masks_of(layer, "wanda", x, sparsity=0.5, method="tensor").values()
    expected = wanda.by_row(wanda.scores(numpy(layer.weight), numpy(x)), 0.5)
    assert np.array_equal(numpy(rows), expected)
    assert (rows != whole).double().mean() > 0.1


def test_snip_is_the_slope_of_the_loss_in_each_connection():
    torch.manual_seed(4)
    layer = nn.Linear(5, 3).double()
    x, y = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)

    def loss(model, batch):
        return F.mse_loss(model(batch[0]), batch[1])

    scores = compute_layer_importance(layer, "snip", [(x, y)], loss_fn=loss)["weight"]
    gates = torch.ones(3, 5, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(F.mse_loss(F.linear(x, gates * layer.weight, layer.bias), y), gates)
    assert torch.allclose(scores, slopes.abs(), rtol=1e-12)


values = st.lists(st.integers(-6, 6).map(float), min_size=1, max_size=12)


@settings(max_examples=60)
@given(values=values)
def test_lamp_scores_are_the_papers_also_at_ties(values):
    found = importances["lamp"](torch.tensor([values]))
    assert found.dtype == torch.float64
    assert found[0].tolist() == pytest.approx(lamp.scores(values), rel=1e-14)


@pytest.mark.parametrize("n", [2_000_000, pytest.param(10_000_000, marks=pytest.mark.slow)])
def test_trap_07_lamp_keeps_its_order_where_float32_sums_run_out(n):
    weight = torch.rand(n, generator=torch.Generator().manual_seed(0)) * 0.001 + 0.02
    squares = np.sort(weight.numpy()) ** 2
    shifted = squares.sum(dtype=np.float32) - np.cumsum(squares, dtype=np.float32)  # as in the authors' code
    assert shifted.min() < 0  # what goes wrong there
    score = importances["lamp"](weight.view(100, -1)).view(-1).numpy()
    distinct, counts = np.unique(weight.numpy(), return_counts=True)
    exact = distinct.astype(np.float64) ** 2
    exact /= np.cumsum((exact * counts)[::-1])[::-1]
    some = np.arange(0, n, 97)
    assert np.allclose(score[some], exact[np.searchsorted(distinct, weight.numpy()[some])], rtol=1e-9, atol=0)
    by_weight = some[np.argsort(weight.numpy()[some], kind="stable")]
    steps, rises = np.diff(score[by_weight]), np.diff(weight.numpy()[by_weight]) > 0
    assert (steps[rises] > 0).all()  # strictly: in float32 near neighbours would be one
    assert (steps[~rises] == 0).all()


def test_lamp_of_zeros_and_of_nan():
    assert importances["lamp"](torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2
    with pytest.raises(ValueError, match="the weight holds 1 NaN"):
        importances["lamp"](torch.tensor([[1.0, float("nan")]]))


def test_a_score_sees_one_expert_at_a_time():
    seen = []

    def look(weight, stats):
        seen.append((tuple(weight.shape), tuple(stats.hessian.shape), tuple(stats.input_norm.shape)))
        return weight.abs()

    from resu.pruning.importance import Importance

    layer = select(Experts(3, 5, 4, True), "up")["up"]
    stats = Stats(hessian=torch.eye(4).expand(3, 4, 4), input_norm=torch.ones(15, 4))
    scores = score_layer(Importance("look", look), layer, stats)
    assert seen == [((5, 4), (4, 4), (5, 4))] * 3
    assert torch.equal(layer.unmatrix(scores), layer.weight.detach().abs())
    assert NM(2, 4).violations(NM(2, 4).select(scores, 0)) == 0
