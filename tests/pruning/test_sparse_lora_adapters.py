"""Several adapters by name: which act, which go, and what is saved of one."""

import copy

import pytest
import torch
from safetensors.torch import load, save

from resu.pruning.sparse_lora import (
    adapter_names,
    adapter_state_dict,
    apply_sparse_lora,
    delete_adapter,
    disabled_adapters,
    enable_adapters,
    get_lora_layers,
    load_adapter_state_dict,
    lora_parameters,
    merge_all_lora_weights,
    set_adapters,
    unload_sparse_lora,
)
from tests.pruning.lora_models import MODES, adapted, batch, config, learn, network, random_masks, same_bits


@pytest.mark.parametrize("mode", MODES)
def test_active_ones_add_up_and_train(mode):
    model, _ = adapted(mode, torch.float64, ("a", "b"))
    model.eval()
    base = {name: layer.weight.clone() for name, layer in get_lora_layers(model).items()}
    deltas = {}
    for active in ("a", "b", ["a", "b"]):
        set_adapters(model, active)
        deltas[str(active)] = {n: layer.effective_weight() - base[n] for n, layer in get_lora_layers(model).items()}
        training = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
        assert training == set(active)
    for name, both in deltas["['a', 'b']"].items():
        torch.testing.assert_close(both, deltas["a"][name] + deltas["b"][name])
    assert adapter_names(model) == ["a", "b"]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("mode", MODES)
def test_disabled_is_the_base_exactly(mode, bits, merged):
    model, masks = adapted(mode, adapters=("a", "b"), base_bits=bits)
    model.eval()
    if merged:
        merge_all_lora_weights(model, preserve_sparsity=False)
    acting = model(batch())
    plain, _ = adapted(mode, adapters=("a",), base_bits=bits)
    with torch.no_grad():
        expected = apply_sparse_lora(network(), masks, config(mode, base_bits=bits))(batch())
        with disabled_adapters(model):
            assert torch.equal(model(batch()), expected)
    assert torch.equal(model(batch()), acting)
    enable_adapters(model, False)
    assert torch.equal(model(batch()), expected)
    merge_all_lora_weights(model, preserve_sparsity=False)  # nothing acts, nothing is merged
    assert torch.equal(model(batch()), expected)
    enable_adapters(model)
    assert torch.equal(model(batch()), acting) or not merged or mode == "sparse_to_dense"
    delete_adapter(plain, "a")
    assert torch.equal(plain.eval()(batch()), expected)


def test_deleting_and_adding_again():
    model, masks = adapted(adapters=("a", "b"))
    set_adapters(model, "b")
    expected = model.eval()(batch())
    set_adapters(model, ["a", "b"])
    delete_adapter(model, "a")
    assert torch.equal(model(batch()), expected)
    with pytest.raises(ValueError, match="no adapter 'a'; there are: b"):
        delete_adapter(model, "a")
    with pytest.raises(ValueError, match="no adapter 'a'; there are: b"):
        set_adapters(model, ["b", "a"])
    apply_sparse_lora(model, masks, config(), "a")
    with pytest.raises(ValueError, match=r"'0\.weight' has an adapter 'a' already"):
        apply_sparse_lora(model, None, config(), "a")
    with pytest.raises(ValueError, match="another mode cannot be added"):
        apply_sparse_lora(model, None, config("scale"), "c")
    other = random_masks(model, seed=4)
    with pytest.raises(ValueError, match="has another mask already"):
        apply_sparse_lora(model, {"3.weight": other["3.weight"]}, config(target_modules=["3"]), "c")
    assert adapter_names(model) == ["b", "a"]


def test_an_adapter_of_some_layers_only():
    model, _ = adapted(adapters=("a",))
    apply_sparse_lora(model, None, config(target_modules=["3", "6"], r=2), "b")
    assert [name for name, layer in get_lora_layers(model).items() if "b" in layer.configs] == ["3.weight", "6.weight"]
    set_adapters(model, "b")
    assert get_lora_layers(model)["4.weight"].active == []
    merge_all_lora_weights(model, adapters=["b"])
    assert [layer.merged for layer in get_lora_layers(model).values()] == [(), ("b",), (), ("b",)]


@pytest.mark.parametrize("mode", MODES)
def test_a_saved_adapter_is_the_same_in_a_fresh_model(mode):
    options = {"train_norms": True, "train_biases": True}
    model, masks = adapted(mode, adapters=("a", "b"), **options)
    optimizer = torch.optim.Adam(lora_parameters(model), lr=0.01)
    model(batch()).square().sum().backward()
    optimizer.step()
    set_adapters(model, "b")
    model.eval()
    expected = model(batch())
    data = save(adapter_state_dict(model, "b"))  # safetensors takes it as it is
    fresh = apply_sparse_lora(network(), masks, config(mode, **options), "mine").eval()
    merge_all_lora_weights(fresh)
    state = load(data)
    assert {"3.lora_A", "3.lora_B", "5.weight", "3.bias"} < set(state)
    load_adapter_state_dict(fresh, state, "mine")
    assert torch.equal(fresh(batch()), expected)
    assert same_bits(adapter_state_dict(fresh, "mine"), state)
    with pytest.raises(ValueError, match=r"missing 3\.lora_A; unknown 9\.lora_A"):
        load_adapter_state_dict(fresh, {k.replace("3.lora_A", "9.lora_A"): v for k, v in state.items()}, "mine")
    with pytest.raises(ValueError, match=r"'3.lora_A' has shape \(1, 96\), expected \(3, 96\)"):
        load_adapter_state_dict(fresh, state | {"3.lora_A": state["3.lora_A"][:1]}, "mine")
    with pytest.raises(ValueError, match="no adapter 'default'; there are: mine"):
        adapter_state_dict(fresh)
    assert same_bits(adapter_state_dict(fresh, "mine"), state)


def test_whole_states_resume_bit_for_bit():
    model, _ = adapted(adapters=("a", "b"), dropout=0.2)
    other, _ = adapted(adapters=("a", "b"), dropout=0.2)
    learn(other, seed=8)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.01)

    def steps(one, its):
        for _ in range(2):
            its.zero_grad()
            one(batch()).square().sum().backward()
            its.step()

    steps(model, optimizer)
    state, moments, random = save(model.state_dict()), copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    steps(model, optimizer)
    other.load_state_dict(load(state))
    resumed = torch.optim.AdamW(lora_parameters(other), lr=0.01)
    resumed.load_state_dict(moments)
    torch.set_rng_state(random)
    steps(other, resumed)
    assert same_bits(dict(other.state_dict()), dict(model.state_dict()))
    unload_sparse_lora(other)
    assert not get_lora_layers(other)
