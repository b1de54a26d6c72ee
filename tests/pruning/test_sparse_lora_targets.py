"""Which layers get adapters, which masks fit, what is refused, and that a refusal changes nothing."""

import copy

import pytest
import torch
from torch import nn

from resu.core.mask import SparseMask
from resu.modules.convert import convert_to_resu
from resu.pruning.holding import hold_masks
from resu.pruning.sparse_lora import (
    apply_sparse_lora,
    get_lora_layers,
    lora_parameters,
    merge_all_lora_weights,
    unload_sparse_lora,
    validate_sparsity_preserved,
)
from tests.pruning import hf_models
from tests.pruning.lora_models import Conv1D, batch, config, learn, network, random_masks, same_bits


def linear_config(mode="sparse_to_sparse", **options):
    return config(mode, **{"target_modules": ["Linear"], **options})


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        (["Linear"], [], ["3", "4", "6"]),
        (["Conv1D"], [], ["4"]),
        (["Conv2d"], [], ["0"]),
        (["Linear", "Conv2d"], ["6", "0"], ["3", "4"]),
        (["[34]"], [], ["3", "4"]),
        ("3", [], ["3"]),
        (["3.weight"], [], ["3"]),
    ],
)
def test_kinds_and_globs(targets, exclude, expected):
    model = network()
    settings = config(target_modules=targets, exclude_modules=exclude)
    model = apply_sparse_lora(model, random_masks(model), settings)
    assert list(get_lora_layers(model)) == [f"{name}.weight" for name in expected]


def test_last_part_of_a_name_as_in_peft():
    model = nn.ModuleDict(
        {"a": nn.ModuleDict({"q_proj": nn.Linear(4, 4)}), "b": nn.ModuleDict({"q_proj": nn.Linear(4, 4)})}
    )
    apply_sparse_lora(model, None, config(target_modules=["q_proj"]))
    assert list(get_lora_layers(model)) == ["a.q_proj.weight", "b.q_proj.weight"]


def test_masks_of_other_layers_are_laid_on_and_held():
    model = network()
    masks = random_masks(model)
    model = apply_sparse_lora(model, masks, linear_config(target_modules=["3"], train_head=["6"]))
    assert list(get_lora_layers(model)) == ["3.weight"]
    assert validate_sparsity_preserved(model, masks, 0)[0]
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.1)
    model(batch()).square().sum().backward()
    optimizer.step()
    assert validate_sparsity_preserved(model, masks, 0)[0]
    assert model[6].weight.grad is not None
    copied = copy.deepcopy(model)
    optimizer = torch.optim.SGD(copied.parameters(), lr=0.1)
    copied(batch()).square().sum().backward()
    optimizer.step()
    assert validate_sparsity_preserved(copied, masks, 0)[0]
    assert not torch.equal(copied[6].weight, model[6].weight)
    apply_sparse_lora(model, masks, linear_config(target_modules=["3"]), "second")  # the same masks once more
    unload_sparse_lora(model)
    held = hold_masks(model, masks)  # nothing holds them any more
    held.release()


def test_targets_without_a_mask_get_none():
    model = network()
    masks = random_masks(model)
    model = apply_sparse_lora(model, {"3.weight": masks["3.weight"]}, linear_config())
    assert list(get_lora_layers(model)) == ["3.weight"]


def test_without_masks_by_magnitude_and_exact():
    model = network()
    expected = SparseMask.from_magnitude(model[3].weight, 0.7)
    model = apply_sparse_lora(model, None, linear_config(initial_sparsity=0.7))
    layers = get_lora_layers(model)
    assert list(layers) == ["3.weight", "4.weight", "6.weight"]
    assert layers["3.weight"].mask == expected
    assert all(layer.mask.n_pruned == int(0.7 * layer.mask.numel) for layer in layers.values())
    assert (model[0].weight != 0).all()


def test_head_and_what_is_tied_stay_out_unless_named():
    def model():
        m = nn.ModuleDict({"wte": nn.Embedding(9, 4), "fc": nn.Linear(4, 4), "lm_head": nn.Linear(4, 9, bias=False)})
        m["lm_head"].weight = m["wte"].weight
        return m

    assert list(get_lora_layers(apply_sparse_lora(model(), None, linear_config()))) == ["fc.weight"]
    shared = model()
    before = {k: v.clone() for k, v in shared.state_dict().items()}
    for masks in (None, {"lm_head.weight": torch.rand(9, 4) > 0.5}):
        with pytest.raises(ValueError, match=r"one weight of several modules \(wte.weight, lm_head.weight\)"):
            apply_sparse_lora(shared, masks, linear_config(target_modules=["lm_head"]))
    assert same_bits(dict(shared.state_dict()), before)
    assert all(p.requires_grad for p in shared.parameters())
    assert not get_lora_layers(shared)


def test_a_module_used_twice_is_one_layer():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(4, 2)})
    model = learn(apply_sparse_lora(model, None, linear_config(dropout=0.0)))
    assert model["a"] is model["b"][0]
    assert list(get_lora_layers(model)) == ["a.weight", "c.weight"]
    x = torch.randn(2, 4)
    expected = model["a"](x)
    merge_all_lora_weights(model)
    unload_sparse_lora(model)
    assert model["a"] is model["b"][0]
    assert type(model["a"]) is nn.Linear
    torch.testing.assert_close(model["b"](x), expected)


def _untouched(call, error, match):
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=match):
        call(model)
    assert same_bits(dict(model.state_dict()), before)
    assert all(p.requires_grad for p in model.parameters())
    assert not get_lora_layers(model)


@pytest.mark.parametrize(
    ("masks", "options", "error", "match"),
    [
        ({"7.weight": (2, 2)}, {}, ValueError, "no parameter '7.weight'; it has: 0.weight"),
        ({"3.weight": (2, 2)}, {}, ValueError, r"shape \(2, 2\), the parameter \(10, 96\)"),
        ({"5.weight": (12,)}, {}, ValueError, "'Linear' matches no layer with a mask.*none"),
        ({"3.weight": (10, 96)}, {"target_modules": ["4"]}, ValueError, "'4' matches no layer with a mask.*3.weight"),
        ({"3.weight": (10, 96)}, {"exclude_modules": ["fc*"]}, ValueError, "exclude_modules: 'fc.' matches no layer"),
        ({"3.weight": (10, 96)}, {"exclude_modules": ["3"]}, ValueError, "leaves no layer to adapt"),
        ({"3.weight": (10, 96)}, {"train_head": ["head"]}, ValueError, "train_head: 'head' matches no parameter"),
        ({"3.weight": (10, 96)}, {"train_head": ["3"]}, ValueError, "names 3.weight, which adapters are for"),
        (None, {"target_modules": ["lm_head."]}, ValueError, "'lm_head.' matches no layer"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_and_changes_nothing(masks, options, error, match):
    given = masks and {name: torch.rand(shape) > 0.5 for name, shape in masks.items()}
    _untouched(lambda model: apply_sparse_lora(model, given, linear_config(**options)), error, match)


def test_masks_and_names_of_the_wrong_kind():
    _untouched(lambda m: apply_sparse_lora(m, {"3.weight": torch.ones(10, 96)}, linear_config()), TypeError, "bool")
    _untouched(lambda m: apply_sparse_lora(m, None, linear_config(), "a.b"), ValueError, "without dots")
    _untouched(lambda m: apply_sparse_lora(m, None, linear_config(), "keys"), ValueError, "none of a method's")
    with pytest.raises(ValueError, match="no layer that takes adapters"):
        apply_sparse_lora(nn.LayerNorm(3), None, linear_config())
    with pytest.raises(ValueError, match="'weight' is on the meta device"):
        apply_sparse_lora(nn.Linear(3, 3, device="meta"), None, linear_config())
    broken = nn.Linear(3, 3)
    broken.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        apply_sparse_lora(broken, {"weight": torch.ones(3, 3, dtype=torch.bool)}, linear_config(base_bits=4))


def test_a_weight_that_is_held_is_refused():
    model = network()
    masks = random_masks(model)
    with hold_masks(model, {"3.weight": masks["3.weight"]}), pytest.raises(ValueError, match=r"'3\.weight' is held"):
        apply_sparse_lora(model, masks, linear_config())
    resurrection = convert_to_resu(nn.Sequential(nn.Linear(4, 4)))
    resurrection[0].prune_by_magnitude(0.5)
    with pytest.raises(ValueError, match="no layer that takes adapters"):
        apply_sparse_lora(resurrection, None, linear_config())


def test_attention_projections_of_torch_are_left_alone():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    apply_sparse_lora(model, None, linear_config())
    assert list(get_lora_layers(model)) == ["fc.weight"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, []),
        ({"train_norms": True}, ["5.weight", "5.bias"]),
        ({"train_biases": True}, ["0.bias", "3.bias", "4.bias", "5.bias"]),
        ({"train_head": ["6"]}, ["6.weight"]),
        ({"train_head": "0", "train_norms": True}, ["0.weight", "0.bias", "5.weight", "5.bias"]),
    ],
)
def test_what_trains_beside_the_adapter(options, expected):
    model = network()
    masks = {"3.weight": random_masks(model)["3.weight"], "4.weight": random_masks(model)["4.weight"]}
    model = learn(apply_sparse_lora(model, masks, linear_config(**options)))
    open_ = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [name for name in open_ if ".lora_" not in name] == expected
    assert {id(p) for p in lora_parameters(model)} == {id(model.get_parameter(name)) for name in open_}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(batch()).square().sum().backward()
    optimizer.step()
    moved = [name for name, p in model.named_parameters() if not same_bits(p.detach(), before[name])]
    assert moved == open_


def test_training_improves_a_pruned_network_in_every_mode():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(256, 16)
    y = teacher(x).detach()
    for mode in ("sparse_to_dense", "sparse_to_sparse", "scale"):
        model = apply_sparse_lora(copy.deepcopy(teacher), None, linear_config(mode, r=8, dropout=0.0))
        optimizer = torch.optim.Adam(lora_parameters(model), lr=1e-2)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.6 * losses[0], mode
        merge_all_lora_weights(model, preserve_sparsity=False)
        assert (model(x) - y).square().mean().item() < 0.65 * losses[0]
        unload_sparse_lora(model)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("bits", [None, 4])
def test_models_of_transformers(family, bits):
    model = getattr(hf_models, family)()
    settings = linear_config(base_bits=bits, dropout=0.0)
    model = learn(apply_sparse_lora(model, None, settings), size=0.1)
    names = list(get_lora_layers(model))
    assert len(names) == {"llama": 14, "gpt2": 8}[family]
    assert not any("lm_head" in name for name in names)
    tokens = torch.randint(hf_models.VOCAB, (2, hf_models.TOKENS))
    model.train()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert all(p.grad is not None for p in lora_parameters(model))
    model.eval()
    expected = model(tokens).logits
    masks = {name: layer.mask for name, layer in get_lora_layers(model).items()}
    merge_all_lora_weights(model)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    unload_sparse_lora(model)
    assert validate_sparsity_preserved(model, masks, 0)[0]
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    if family == "gpt2":
        assert type(model.transformer.h[0].mlp.c_fc).__module__.startswith("transformers")


def test_conv1d_of_another_library_is_told_by_its_name():
    model = apply_sparse_lora(nn.Sequential(Conv1D(3, 4)), None, linear_config())
    assert get_lora_layers(model)["0.weight"].weight_shape == (4, 3)
