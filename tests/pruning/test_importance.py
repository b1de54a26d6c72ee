"""Scores against their formulas, element by element."""

import pytest
import torch
from torch import nn

from resu.pruning.importance import (
    Stats,
    compute_layer_importance,
    gradient_importance,
    importances,
    magnitude_importance,
    random_importance,
    register_importance,
    taylor_importance,
)
from tests.core.test_layers import Conv1D


def layer_with_gradient():
    layer = nn.Linear(3, 2)
    layer(torch.randn(5, 3)).square().sum().backward()
    return layer


def test_formulas():
    w, g, x = torch.randn(4, 3), torch.randn(4, 3), torch.rand(3)
    stats = Stats(grad=g, grad_squared=g.square() + 1, input_norm=x)
    assert torch.equal(importances["magnitude"](w), w.abs())
    assert torch.equal(importances["gradient"](w, stats), g.abs())
    assert torch.equal(importances["taylor"](w, stats), (w * g).abs())
    assert torch.equal(importances["fisher"](w, stats), w.square() * (g.square() + 1))
    assert torch.equal(importances["wanda"](w, stats), w.abs() * x[None, :])


def test_layer_functions():
    layer = layer_with_gradient()
    w, g = layer.weight.detach(), layer.weight.grad
    assert torch.equal(magnitude_importance(layer), w.abs())
    assert torch.equal(gradient_importance(layer), g.abs())
    assert torch.equal(taylor_importance(layer), (w * g).abs())
    assert not taylor_importance(layer).requires_grad
    with pytest.raises(TypeError, match="a layer with a weight"):
        magnitude_importance(nn.ReLU())


def test_trap_17_a_score_without_gradients_is_an_error():
    layer = layer_with_gradient()
    layer.zero_grad()
    for score in (taylor_importance, gradient_importance):
        with pytest.raises(ValueError, match=r"needs gradients and there are none; call backward\(\) first"):
            score(layer)
    with pytest.raises(ValueError, match=r"'0.weight': importance 'taylor' needs gradients"):
        compute_layer_importance(nn.Sequential(nn.Linear(2, 2)), "taylor")
    with pytest.raises(ValueError, match="needs input norms"):
        importances["wanda"](torch.randn(2, 2))


def test_products_do_not_underflow_in_half_precision():
    w = torch.full((2, 2), 1e-4, dtype=torch.float16)
    score = importances["taylor"](w, Stats(grad=w))
    assert score.dtype == torch.float32
    assert (score > 0).all()


@pytest.mark.parametrize("shape", [(3,), (3, 2, 2), (6, 3, 2, 2)])
def test_wanda_takes_norms_per_channel_per_column_and_per_row(shape):
    w, norm = torch.randn(6, 3, 2, 2), torch.rand(shape)
    expected = w.abs() * (norm[:, None, None] if norm.ndim == 1 else norm)
    assert torch.equal(importances["wanda"](w, Stats(input_norm=norm)), expected)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 3), (2, 6, 3, 2, 2)])
def test_wanda_refuses_norms_that_do_not_fit(shape):
    with pytest.raises(ValueError, match="do not fit a weight of shape"):
        importances["wanda"](torch.randn(6, 3, 2, 2), Stats(input_norm=torch.rand(shape)))


def test_random_scores_repeat_with_their_generator():
    layer = nn.Linear(5, 4)
    draw = [random_importance(layer, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    torch.manual_seed(3)
    first = random_importance(layer)
    torch.manual_seed(3)
    assert torch.equal(first, random_importance(layer))


def test_trap_26_random_scores_of_a_model_depend_on_seed_and_name_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    first = compute_layer_importance(model, "random", seed=1)
    assert not torch.equal(first["0.weight"], first["1.weight"])
    alone = compute_layer_importance(model, "random", seed=1, include="1")
    assert torch.equal(alone["1.weight"], first["1.weight"])
    # A figure of its own, for Python's hash() of a text would give another in each process.
    assert first["0.weight"][0, 0].item() == pytest.approx(0.995274655345705)


def test_trap_11_conv1d_is_scored_by_its_inputs():
    layer, x = Conv1D(5, 3), torch.randn(7, 3)
    layer.forward = lambda x: x @ layer.weight + layer.bias
    scores = compute_layer_importance(nn.ModuleDict({"c": layer}), "magnitude")
    assert torch.equal(scores["c.weight"], layer.weight.detach().abs())

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = layer

        def forward(self, x):
            return self.c(x)

    scores = compute_layer_importance(Net(), "wanda", [x])
    assert torch.allclose(scores["c.weight"], layer.weight.detach().abs() * x.norm(dim=0)[:, None])


def test_unknown_methods_list_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown importance 'magnitud'; known: .*fisher, gradient, .*lamp, .*magnitude"
    ):
        compute_layer_importance(nn.Linear(2, 2), "magnitud")


def test_gradients_over_data_need_a_loss():
    with pytest.raises(ValueError, match="pass loss_fn"):
        compute_layer_importance(nn.Linear(2, 2), "taylor", [torch.ones(1, 2)])


def test_a_score_of_ones_own_works_by_name():
    @register_importance("flipped", replace=True)
    def flipped(weight, stats):
        return -weight.abs()

    try:
        scores = compute_layer_importance(nn.Linear(2, 2), "flipped")
        assert (scores["weight"] <= 0).all()
        with pytest.raises(ValueError, match="registered already"):
            register_importance("flipped")(flipped)
    finally:
        del importances._items["flipped"]


def test_what_a_score_declares_is_checked():
    with pytest.raises(ValueError, match="unknown need activations; known: grads, hessian, inputs"):
        register_importance("x", needs={"activations"})
    with pytest.raises(ValueError, match="scope must be"):
        register_importance("x", scope="column")

    @register_importance("wrong shape", replace=True)
    def wrong_shape(weight, stats):
        return weight.sum()

    try:
        with pytest.raises(ValueError, match=r"'wrong shape' returned scores of shape \(\)"):
            importances["wrong shape"](torch.rand(2, 2))
    finally:
        del importances._items["wrong shape"]
