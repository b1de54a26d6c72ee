"""Which weights are meant."""

import pytest
import torch
from torch import nn

from resu.core.layers import select


class Conv1D(nn.Module):  # as in transformers: the weight is [in, out]
    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.norm = nn.Linear(4, 8), nn.Linear(8, 4), nn.LayerNorm(4)


class Net(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.wte = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(4, 10, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight


def test_linear_and_convolution_weights_in_the_models_order():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2), nn.ConvTranspose3d(1, 1, 2)
    )
    assert list(select(model)) == ["0.weight", "3.weight", "4.weight"]
    assert select(model)["3.weight"].module is model[3]
    assert select(model)["3.weight"].weight is model[3].weight


def test_embeddings_and_norms_are_out_and_the_output_layer_is_in():
    names = list(select(Net()))
    assert names == [f"blocks.{i}.fc{j}.weight" for i in (0, 1) for j in (1, 2)] + ["lm_head.weight"]


def test_attention_is_found():
    assert list(select(nn.MultiheadAttention(4, 2))) == ["in_proj_weight", "out_proj.weight"]
    layers = select(nn.MultiheadAttention(4, 2, kdim=3, vdim=3))
    assert {"q_proj_weight", "k_proj_weight", "v_proj_weight"} <= set(layers)


@pytest.mark.parametrize(
    ("include", "names"),
    [
        ("lm_head", ["lm_head.weight"]),
        ("lm_head.weight", ["lm_head.weight"]),
        ("blocks.*.fc1", ["blocks.0.fc1.weight", "blocks.1.fc1.weight"]),
        (["blocks.0.*", "wte"], ["wte.weight", "blocks.0.fc1.weight", "blocks.0.fc2.weight"]),
    ],
)
def test_globs_over_parameter_and_module_names(include, names):
    assert list(select(Net(), include)) == names


def test_exclude_comes_last():
    assert list(select(Net(), "blocks.*", "blocks.1.*")) == ["blocks.0.fc1.weight", "blocks.0.fc2.weight"]


@pytest.mark.parametrize("glob", ["lm_head.", "LM_HEAD", "head", "blocks.?.fc3", "lm_head.bias", "*.norm"])
@pytest.mark.parametrize("where", ["include", "exclude"])
def test_trap_13_a_glob_that_matches_nothing_is_an_error(glob, where):
    with pytest.raises(ValueError, match=r"matches no weight of the model; weights are: wte.weight"):
        select(Net(), **{where: glob})


def test_trap_13_excluding_the_output_layer_excludes_it():
    assert "lm_head.weight" not in select(Net(), exclude="lm_head")


def test_trap_10_a_tie_to_an_embedding_is_one_layer_and_left_out_unless_named():
    assert "lm_head.weight" not in select(Net(tied=True))
    assert "wte.weight" not in select(Net(tied=True))
    for glob in ("lm_head", "wte", "wte.weight"):
        layers = select(Net(tied=True), glob)
        assert list(layers) == ["lm_head.weight"]
        assert layers["lm_head.weight"].ties == ("wte.weight",)
    assert next(iter(select(Net(tied=True), "*", exclude="wte"))).startswith("blocks")


def test_trap_10_tied_linear_layers_are_one():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    layers = select(model)
    assert list(layers) == ["0.weight"]
    assert layers["0.weight"].ties == ("1.weight",)


def test_trap_10_a_module_used_twice_is_one_layer_under_both_names():
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": layer, "b": layer})
    assert select(model)["a.weight"].ties == ("b.weight",)
    assert list(select(model, "b")) == ["a.weight"]
    with pytest.raises(ValueError, match="no prunable weight"):
        select(model, exclude="b")


def test_trap_11_conv1d_of_transformers_is_found_and_marked():
    layers = select(nn.ModuleDict({"c_fc": Conv1D(8, 4), "out": nn.Linear(8, 2)}))
    assert layers["c_fc.weight"].transposed
    assert not layers["out.weight"].transposed


def test_trap_11_a_tied_conv1d_stays_marked():
    model = nn.ModuleDict({"e": nn.Embedding(4, 8), "c": Conv1D(8, 4)})
    model["c"].weight = model["e"].weight
    layer = select(model, "c")["c.weight"]
    assert layer.transposed
    assert layer.ties == ("e.weight",)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.up = nn.Parameter(torch.randn(3, 4, 8))
        self.position = nn.Parameter(torch.randn(1, 5, 4))


def test_trap_12_stacked_experts_are_not_skipped_in_silence():
    with pytest.warns(UserWarning, match="stacked weights are not pruned by default: up; name them"):
        assert list(select(Experts())) == ["router.weight"]
    assert list(select(Experts(), ["up", "router"])) == ["up", "router.weight"]
    assert list(select(Experts(), exclude="up")) == ["router.weight"]  # said, so no warning


class TransposedExperts(nn.Module):
    def __init__(self, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(3, 4, 8))


class Llama4TextExperts(nn.Module):  # multiplies with [experts, in, out] and has no attribute that says so
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 4, 8))


def test_trap_12_stacks_are_taken_where_asked_and_say_how_they_lie():
    layers = select(Experts(), stacks=True)
    assert list(layers) == ["up", "router.weight"]  # a table of positions is no stack
    assert (layers["up"].stacked, layers["up"].transposed) == (True, False)
    assert select(TransposedExperts(True), stacks=True)["up"].transposed
    assert not select(TransposedExperts(False), stacks=True)["up"].transposed
    assert select(Llama4TextExperts(), "gate_up_proj")["gate_up_proj"].transposed
    model = nn.ModuleDict({"norm": nn.LayerNorm((2, 3, 4)), "fc": nn.Linear(2, 2), "conv": nn.Conv1d(2, 3, 4)})
    assert not any(layer.stacked for layer in select(model, "*").values())


def a_layer(kind):
    module = {
        "linear": lambda: nn.Linear(4, 6),
        "bilinear": lambda: nn.Bilinear(4, 5, 6),
        "conv1d": lambda: Conv1D(6, 4),
        "conv": lambda: nn.Conv2d(4, 6, 3, groups=2),
        "transposed conv": lambda: nn.ConvTranspose2d(4, 6, 3),
        "grouped transposed conv": lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
        "stack": lambda: TransposedExperts(False),
        "transposed stack": lambda: TransposedExperts(True),
    }[kind]()
    return next(iter(select(module, "*").values()))


KINDS = {
    "linear": (6, 4),
    "bilinear": (6, 4, 5),
    "conv1d": (6, 4),
    "conv": (6, 2, 3, 3),
    "transposed conv": (6, 4, 3, 3),
    "grouped transposed conv": (6, 2, 3),
    "stack": (12, 8),
    "transposed stack": (24, 4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_trap_11_matrices_have_outputs_first_and_lead_back(kind):
    layer = a_layer(kind)
    matrix = layer.matrix(layer.weight)
    assert matrix.shape == KINDS[kind]
    assert torch.equal(layer.unmatrix(matrix), layer.weight)
    mask = torch.rand(matrix.shape) > 0.5
    back = layer.unmatrix(mask)
    assert back.shape == layer.weight.shape
    assert back.is_contiguous()
    assert torch.equal(layer.matrix(back), mask)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("conv", "bilinear") and "stack" not in k])
def test_trap_11_a_row_of_the_matrix_is_what_makes_one_output(kind):
    layer = a_layer(kind)
    weight = torch.zeros_like(layer.matrix(layer.weight))
    weight[3] = 1
    with torch.no_grad():
        layer.weight.copy_(layer.unmatrix(weight))
        layer.module.bias.zero_()
        x = torch.ones(2, 4, *[5] * (layer.weight.ndim - 2))
        if kind == "conv1d":
            out = x @ layer.weight
        else:
            out = layer.module(x)
    assert out[:, 3].abs().min() > 0
    assert not out[:, [0, 1, 2, 4, 5]].any()


def test_a_tensor_of_another_shape_is_no_stack():
    with pytest.raises(ValueError, match=r"'up' is a stack \[experts, out, in\]; got a tensor of shape \(2, 2\)"):
        a_layer("stack").matrix(torch.ones(2, 2))


def test_nothing_to_prune_is_an_error():
    for model in (nn.ReLU(), nn.LayerNorm(3), nn.Embedding(3, 2)):
        with pytest.raises(ValueError, match="no prunable weight is selected"):
            select(model)
    with pytest.raises(ValueError, match="no prunable weight"):
        select(nn.Linear(2, 2), exclude="weight")


def test_the_root_may_be_a_layer():
    assert list(select(nn.Linear(2, 2))) == ["weight"]


def test_trap_25_weights_are_looked_up_at_each_use():
    model = nn.Sequential(nn.Linear(2, 2))
    layer = select(model)["0.weight"]
    model[0].weight = nn.Parameter(torch.zeros(2, 2))
    assert layer.weight is model[0].weight


def test_a_layer_without_a_shape_yet_is_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    with pytest.raises(ValueError, match="1 is lazy: run one batch"):
        select(model)


def test_weights_that_are_computed_are_not_left_out_in_silence():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match=r"computed \(weight_norm.* are not pruned: 0;"):
        assert list(select(model)) == ["1.weight"]
    assert list(select(model, exclude="0.*")) == ["1.weight"]  # who knows it hears nothing
    assert list(select(model, "1")) == ["1.weight"]
