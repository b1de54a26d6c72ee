import copy

import pytest
import torch
from torch import nn

from resu.modules.base import RESUMode, RESUModule
from resu.modules.conv import RESUConv2d
from resu.modules.convert import convert_to_resu, get_resu_modules, resurrection_parameters
from resu.modules.linear import RESULinear
from resu.training.algorithms import Static
from resu.training.sparsifier import Sparsifier
from tests.modules.helpers import enter, small_model


def test_same_start_values_as_torch():
    torch.manual_seed(3)
    plain = [nn.Linear(8, 4), nn.Conv2d(2, 4, 3)]
    torch.manual_seed(3)
    ours = [RESULinear(8, 4), RESUConv2d(2, 4, 3)]
    for a, b in zip(plain, ours, strict=True):
        assert isinstance(b, type(a))
        assert torch.equal(a.weight, b.weight)
        assert torch.equal(a.bias, b.bias)


def test_parameters_are_shared_and_results_equal():
    model = small_model()
    x = torch.randn(2, 1, 6, 6)
    y = model(x)
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters)
    assert convert_to_resu(model) is model
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert torch.equal(model(x), y)
    assert list(get_resu_modules(model)) == ["0", "3", "5"]
    model(x).sum().backward()
    optimizer.step()
    assert not torch.equal(model(x), y)


def test_state_dict_keys_are_unchanged():
    model = small_model()
    keys = list(model.state_dict())
    assert list(convert_to_resu(model).state_dict()) == keys


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, "5", ["0", "3"]),
        ("3", None, ["3"]),
        (["3.weight", "5"], None, ["3", "5"]),
        ("*", ["0", "3"], ["5"]),
    ],
)
def test_globs(include, exclude, expected):
    model = convert_to_resu(small_model(), include, exclude)
    assert list(get_resu_modules(model)) == expected


def test_globs_that_match_nothing_are_errors():
    with pytest.raises(ValueError, match="matches no weight"):
        convert_to_resu(small_model(), "fc*")
    with pytest.raises(ValueError, match="matches no weight"):
        convert_to_resu(small_model(), exclude="fc*")
    with pytest.raises(ValueError, match="cannot be converted"):
        convert_to_resu(nn.Sequential(nn.Embedding(3, 4)), "0")
    with pytest.raises(ValueError, match="no prunable"):
        convert_to_resu(nn.ReLU())


def test_converting_twice_changes_nothing():
    model = convert_to_resu(small_model())
    layers = get_resu_modules(model)
    assert get_resu_modules(convert_to_resu(model)) == layers


def test_a_layer_itself_is_returned_converted():
    plain = nn.Linear(4, 3)
    layer = convert_to_resu(plain)
    assert isinstance(layer, RESULinear)
    assert layer.weight is plain.weight


def test_training_flag_dtype_options_and_hooks_are_kept():
    calls = []
    plain = nn.Conv2d(4, 8, 3, 2, 1, 1, 2, False, "reflect", dtype=torch.float64).eval()
    plain.register_forward_hook(lambda *a: calls.append(1))
    plain.note = "mine"
    model = convert_to_resu(nn.Sequential(plain))
    layer = model[0]
    assert not layer.training
    assert layer.weight.dtype == torch.float64
    assert layer.bias is None
    assert layer.note == "mine"
    assert (layer.stride, layer.padding, layer.groups, layer.padding_mode) == ((2, 2), (1, 1), 2, "reflect")
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    assert torch.equal(model(x), plain(x))
    assert calls == [1, 1]


def test_a_module_used_twice_stays_one_module():
    shared = nn.Linear(4, 4)
    model = convert_to_resu(nn.Sequential(shared, nn.ReLU(), shared))
    assert model[0] is model[2]
    enter(model[0], "qresu4")
    model(torch.randn(2, 4)).sum().backward()
    assert model[0].theta.grad is not None


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4, bias=False)
        self.b = nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).relu())


def test_tied_weights_stay_tied_and_cannot_be_freed_by_one_layer():
    model = convert_to_resu(_Tied())
    assert model.a.weight is model.b.weight
    model.a.prune_by_magnitude(0.5)
    assert (model.b.weight == 0).sum() == 8
    with pytest.raises(ValueError, match=r"shared with b\.weight"):
        model.a.enter_qresu_mode()
    model.a.enter_resu_mode()
    model(torch.randn(2, 4)).sum().backward()
    other = copy.deepcopy(model)
    assert other.a.weight is other.b.weight
    assert other.a.weight is not model.a.weight


def test_a_weight_has_one_mask_whatever_layers_share_it():
    model = convert_to_resu(_Tied())
    model.a.prune_by_magnitude(0.5)
    before = model.a.weight.detach().clone()
    for prune in (
        lambda: model.b.prune_by_magnitude(0.75),
        lambda: model.b.prune_by_wanda(0.75, torch.ones(4)),
        lambda: model.b.set_mask(torch.eye(4, dtype=torch.bool)),
    ):
        with pytest.raises(ValueError, match=r"shared with a\.weight.* held by another mask.*remove_mask\(\)"):
            prune()
    assert model.b.mode is RESUMode.DENSE
    assert torch.equal(model.a.weight, before)
    model.a.prune_by_magnitude(0.75)  # its own mask is no obstacle
    copied = copy.deepcopy(model)
    copied.load_state_dict(model.state_dict())
    for one in (model, copied):
        one.a.enter_resu_mode()
        with pytest.raises(ValueError, match="held by another mask"):
            one.b.prune_by_magnitude(0.5)
        one.a.exit_resu_mode(commit=False)
        one.a.prune_by_magnitude(0.75)
        one.a.remove_mask()
        one.b.prune_by_magnitude(0.5)
        assert one.b.sparsity == 0.5


def test_a_weight_that_a_sparsifier_holds_is_pruned_after_its_commit():
    layer = RESULinear(4, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    sparsifier = Sparsifier(layer, optimizer, Static(sparsity=0.5))
    with pytest.raises(ValueError, match=r"commit\(\) on the Sparsifier"):
        layer.prune_by_magnitude(0.75)
    sparsifier.commit()
    layer.prune_by_magnitude(0.75)
    assert layer.sparsity == 0.75


def test_a_linear_layer_tied_to_an_embedding_is_left_alone():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.body = nn.Linear(4, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight

    assert list(get_resu_modules(convert_to_resu(Language()))) == ["body"]


def test_subclasses_are_left_alone():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.warns(UserWarning, match=r"left dense: self_attn\.in_proj_weight, self_attn\.out_proj\.weight"):
        convert_to_resu(model)
    assert list(get_resu_modules(model)) == ["linear1", "linear2"]  # not attention's out_proj
    for layer in get_resu_modules(model).values():
        enter(layer, "qresu4")
    x = torch.randn(2, 3, 8)
    y = model(x)
    model.eval()
    with torch.no_grad():
        assert model(x).shape == y.shape  # torch's fused path reads linear1.weight


def test_what_is_selected_and_cannot_be_converted_is_said():
    def model():
        return nn.Sequential(nn.Conv1d(2, 3, 3), nn.Linear(4, 4), nn.MultiheadAttention(4, 2))

    odd = r"0\.weight, 2\.in_proj_weight, 2\.out_proj\.weight"
    with pytest.warns(UserWarning, match=odd) as said:
        converted = convert_to_resu(model())
    assert len(said) == 1
    assert said[0].filename == __file__
    assert list(get_resu_modules(converted)) == ["1"]
    convert_to_resu(model(), exclude=["0", "2*"])  # a warning would be an error here
    convert_to_resu(model(), include="1")
    unchanged = model()
    with pytest.raises(ValueError, match=rf"include names what cannot be converted: {odd}"):
        convert_to_resu(unchanged, include="*")
    assert get_resu_modules(unchanged) == {}
    with pytest.raises(ValueError, match="cannot be converted"):
        convert_to_resu(nn.Conv1d(2, 3, 3))


def test_resurrection_parameters_are_those_of_the_present_mode():
    model = convert_to_resu(small_model())
    assert resurrection_parameters(model) == []
    enter(model[0], "resu")
    enter(model[3], "qresu4")
    enter(model[5], "qresu_selective")
    found = resurrection_parameters(model)
    assert [id(p) for p in found] == [id(model[0].weight), id(model[3].theta)]


@pytest.mark.parametrize("mode", ["resu", "qresu4", "qresu_selective"])
def test_in_a_sequential_model_from_end_to_end(mode):
    model = convert_to_resu(small_model())
    for layer in model.modules():
        if isinstance(layer, RESUModule):
            enter(layer, mode)
    x, y = torch.randn(8, 1, 6, 6), torch.randint(0, 3, (8,))
    parameters = resurrection_parameters(model)
    optimizer = torch.optim.Adam(parameters, lr=0.02) if parameters else None
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(x), y)
        model.zero_grad()
        loss.backward()
        if optimizer:
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for layer in get_resu_modules(model).values():
        layer.exit_resu_mode() if layer.mode is RESUMode.RESU else layer.exit_qresu_mode()
    model(x)
