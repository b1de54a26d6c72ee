"""Input norms and gradients against what autograd and unfold say."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from resu.core.layers import select
from resu.pruning.statistics import collect


def norms(model, batches, **options):
    return {n: s.input_norm for n, s in collect(model, select(model), batches, **options).items()}


def test_linear_norms_over_all_batches_and_tokens():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    batches = [torch.randn(3, 5, 6), torch.randn(2, 5, 6)]
    result = norms(model, batches)
    x = torch.cat([b.reshape(-1, 6) for b in batches])
    assert torch.allclose(result["0.weight"], x.norm(dim=0))
    assert torch.allclose(result["2.weight"], model[1](model[0](x)).detach().norm(dim=0))
    assert result["0.weight"].dtype == torch.float32


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1},
        {"stride": 2, "padding": (2, 0)},
        {"dilation": (1, 2), "padding": 3},
        {"padding": "same"},
        {"padding": "same", "kernel_size": 2},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": 2, "padding_mode": "circular", "stride": 3},
    ],
)
def test_convolution_norms_are_those_of_the_unfolded_columns(options):
    conv = nn.Conv2d(3, 4, **{"kernel_size": (3, 2), **options})
    x = torch.randn(2, 3, 9, 8)
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    padded = F.pad(
        x, (left, right, top, bottom), mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode
    )
    columns = F.unfold(padded, conv.kernel_size, conv.dilation, 0, conv.stride)
    expected = columns.transpose(0, 1).reshape(columns.shape[1], -1).norm(dim=1).view(3, *conv.kernel_size)
    result = norms(nn.Sequential(conv), [x])["0.weight"]
    assert torch.allclose(result, expected, rtol=1e-5)
    # The columns are those the weight multiplies.
    assert conv(x).flatten(2).shape[2] == columns.shape[2]


@pytest.mark.parametrize(
    ("conv", "shape"), [(nn.Conv1d(2, 3, 3, padding=1), (4, 2, 7)), (nn.Conv3d(2, 3, 2), (2, 2, 4, 5, 3))]
)
def test_convolutions_of_other_dimensions(conv, shape):
    x = torch.randn(shape)
    # Gradient of Σ y with respect to the weight is the sum of a column; of squared inputs, its square norm.
    y = type(conv)._conv_forward(conv, x.square(), conv.weight, None)
    (expected,) = torch.autograd.grad(y.sum(), conv.weight)
    result = norms(nn.Sequential(conv), [x])["0.weight"]
    assert torch.allclose(result.square(), expected[0], rtol=1e-4)


def test_grouped_convolutions_see_the_channels_of_their_group():
    conv = nn.Conv2d(4, 6, 3, groups=2)
    x = torch.randn(2, 4, 5, 5)
    (expected,) = torch.autograd.grad(F.conv2d(x.square(), conv.weight, groups=2).sum(), conv.weight)
    result = norms(nn.Sequential(conv), [x])["0.weight"]
    assert result.shape == conv.weight.shape
    assert torch.allclose(result.square(), expected, rtol=1e-4)


def test_unbatched_images_and_single_rows():
    assert norms(nn.Sequential(nn.Conv2d(1, 1, 2)), [torch.ones(1, 3, 3)])["0.weight"].tolist() == [[[2.0] * 2] * 2]
    assert norms(nn.Sequential(nn.Linear(2, 1)), [torch.tensor([3.0, 0.0])])["0.weight"].tolist() == [3.0, 0.0]


def test_trap_32_half_precision_sums_do_not_overflow():
    model = nn.Sequential(nn.Linear(2, 2)).half()
    result = norms(model, [torch.full((1000, 2), 60000.0, dtype=torch.float16)])["0.weight"]
    assert result.dtype == torch.float32
    assert torch.allclose(result, torch.full((2,), 60000.0 * 1000**0.5), rtol=1e-3)


def test_double_stays_double():
    assert (
        norms(nn.Sequential(nn.Linear(2, 2)).double(), [torch.ones(1, 2).double()])["0.weight"].dtype == torch.float64
    )


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x, attention_mask=None):
        return self.fc(x)


@pytest.mark.parametrize("flat", [False, True])
def test_trap_30_padding_tokens_do_not_count(flat):
    model = Tokens()
    x, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    if flat:
        model.forward = lambda x, attention_mask=None: model.fc(x.flatten(0, 1))
    result = norms(model, [{"x": x, "attention_mask": mask}])["fc.weight"]
    assert torch.allclose(result, x[mask.bool()].norm(dim=0))


def test_trap_34_no_attention_mask_is_no_crash():
    x = torch.randn(2, 4, 3)
    for batch in ({"x": x}, {"x": x, "attention_mask": None}):
        assert torch.allclose(norms(Tokens(), [batch])["fc.weight"], x.reshape(-1, 3).norm(dim=0))


def test_trap_31_an_expert_without_tokens_is_said_and_not_nan():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    with pytest.warns(UserWarning, match="'idle.weight' saw no input"):
        result = norms(Experts(), [torch.ones(1, 2)])
    assert result["idle.weight"].tolist() == [1.0, 1.0]


def test_a_layer_called_twice_counts_both():
    layer = nn.Linear(2, 2)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = layer

        def forward(self, x):
            return self.fc(x) + self.fc(3 * x)

    assert norms(Twice(), [torch.ones(1, 2)])["fc.weight"].tolist() == pytest.approx([10**0.5] * 2)


def test_batches_of_every_kind():
    model, x = nn.Sequential(nn.Linear(2, 1)), torch.ones(4, 2)
    for batch in (x, (x,), [x, torch.zeros(4)], {"input": x}):
        assert norms(model, [batch])["0.weight"].tolist() == [2.0, 2.0]
    own = norms(model, [{"image": x}], forward=lambda m, b: m(b["image"]))
    assert own["0.weight"].tolist() == [2.0, 2.0]


def test_inputs_that_are_not_known_or_not_finite_are_errors():
    with pytest.raises(ValueError, match=r"inputs of '0.weight' .ConvTranspose2d. are not known"):
        norms(nn.Sequential(nn.ConvTranspose2d(1, 1, 2)), [])
    with pytest.raises(ValueError, match=r"inputs of '0.weight'"):
        norms(nn.Sequential(nn.Linear(2, 2)), [torch.tensor([[1.0, float("nan")]])])
    with pytest.raises(ValueError, match="there is no batch"):
        norms(nn.Sequential(nn.Linear(2, 2)), [])
    with pytest.raises(ValueError, match="cannot collect activations; known: grads, hessian, inputs"):
        norms(nn.Sequential(nn.Linear(2, 2)), [torch.ones(1, 2)], needs={"activations"})


def loss_of(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def test_gradients_are_means_over_batches():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    batches = [(torch.randn(5, 3), torch.randn(5, 2)) for _ in range(3)]
    stats = collect(model, select(model), batches, {"grads"}, loss_fn=loss_of)
    each = []
    for batch in batches:
        model.zero_grad()
        loss_of(model, batch).backward()
        each.append(model[0].weight.grad.clone())
    assert torch.allclose(stats["0.weight"].grad, torch.stack(each).mean(0), atol=1e-7)
    assert torch.allclose(stats["0.weight"].grad_squared, torch.stack(each).square().mean(0), atol=1e-7)
    assert stats["0.weight"].input_norm is None
    both = collect(model, select(model), batches, {"grads", "inputs"}, loss_fn=loss_of)
    assert both["0.weight"].input_norm is not None


def test_gradient_input_errors():
    model = nn.Sequential(nn.Linear(2, 1))
    with pytest.raises(ValueError, match="need loss_fn"):
        collect(model, select(model), [torch.ones(1, 2)], {"grads"})
    with pytest.raises(ValueError, match="one finite number"):
        collect(model, select(model), [torch.ones(1, 2)], {"grads"}, loss_fn=lambda m, b: m(b).sum() / 0)


class Failing(nn.Sequential):
    def forward(self, x):
        super().forward(x)
        raise RuntimeError("in the middle")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("needs", [{"inputs"}, {"grads"}])
def test_the_model_is_left_as_it_was(fails, needs):
    layers = [nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 1)]
    model = (Failing if fails else nn.Sequential)(*layers)
    model[1].eval()
    model[3].weight.requires_grad_(False)
    model[0].weight.grad = torch.full((2, 2), 7.0)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [m.training for m in model.modules()]

    def run():
        collect(model, select(model), [torch.randn(4, 2)], needs, loss_fn=lambda m, b: m(b).sum())

    if fails:
        with pytest.raises(RuntimeError, match="in the middle"):
            run()
    else:
        run()
    assert [m.training for m in model.modules()] == flags
    assert all(not m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert model[0].weight.grad.eq(7).all()
    assert not model[3].weight.requires_grad
    assert torch.is_grad_enabled()
