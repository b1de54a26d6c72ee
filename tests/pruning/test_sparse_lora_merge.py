"""Merging keeps masks bit-exact and outputs equal; taking out restores weights bit for bit; states while merged."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resu.core.mask import SparseMask
from resu.pruning.sparse_lora import (
    apply_sparse_lora,
    get_lora_layers,
    lora_parameters,
    merge_all_lora_weights,
    merge_loss,
    set_adapters,
    unload_sparse_lora,
    unmerge_all_lora_weights,
    validate_sparsity_preserved,
)
from tests.pruning.lora_models import DTYPES, MODES, adapted, batch, config, learn, same_bits

# Of the dtype's own precision, relative to outputs around 1, through the five layers.
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def weights(model):
    return {name: layer.weight.detach().clone() for name, layer in get_lora_layers(model).items()}


def merged(model, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "sparse_to_dense")
        return merge_all_lora_weights(model, **options)


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_merge_and_unmerge(mode, dtype, bits):
    model, masks = adapted(mode, dtype, ("a", "b", "c"), base_bits=bits)
    model.eval()
    x, before = batch(dtype), weights(model)
    expected = model(x)
    for preserve in (True, False):
        merged(model, preserve_sparsity=preserve)
        ok, _ = validate_sparsity_preserved(model, masks, 0)
        assert ok == (preserve or mode != "sparse_to_dense")
        if ok:
            for name, layer in get_lora_layers(model).items():
                zeros = layer.weight[~masks[name]]
                assert same_bits(zeros, torch.zeros_like(zeros))  # +0.0, not -0.0
        if mode != "sparse_to_dense" or not preserve:  # what is trained is what is merged
            torch.testing.assert_close(model(x), expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
        unmerge_all_lora_weights(model)
        assert same_bits(weights(model), before)
        assert torch.equal(model(x), expected)
    acting = {name: layer.effective_weight() for name, layer in get_lora_layers(model).items()}
    merged(model, preserve_sparsity=False)
    assert same_bits(weights(model), acting)  # what is multiplied with, to the last bit


@given(
    mode=st.sampled_from(MODES), dtype=st.sampled_from(DTYPES), bits=st.sampled_from([None, 4, 8]),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 17)), sparsity=st.floats(0, 1), seed=st.integers(0, 9),
    calls=st.lists(
        st.one_of(
            st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(lambda names: ("merge", names)),
            st.lists(st.sampled_from("abc"), max_size=3).map(lambda names: ("activate", names)),
            st.sampled_from([("unmerge", None), ("all", None), ("save", None)]),
        ),
        max_size=6,
    ),
)  # fmt: skip
@settings(max_examples=80)
def test_any_order_of_calls_restores_the_base(mode, dtype, bits, shape, sparsity, seed, calls):
    torch.manual_seed(seed)
    layer = nn.Linear(shape[1], shape[0]).to(dtype)
    mask = torch.rand(shape) >= sparsity
    for name in "abc":
        options = config(mode, target_modules=["Linear"], base_bits=bits, r=1 + seed % 3)
        layer = apply_sparse_lora(layer, {"weight": mask} if name == "a" else None, options, name)
    learn(layer, seed=seed)
    base = layer.weight.detach().clone()
    for call, names in calls:
        if call == "merge":
            layer.merge(names, preserve_sparsity=bool(seed % 2))
            assert layer.merged == tuple(dict.fromkeys(names))
        elif call == "activate":
            layer.set_active(names)
            assert not layer.merged
        elif call == "all":
            layer.merge()
        elif call == "unmerge":
            layer.unmerge()
        else:
            layer.load_state_dict(layer.state_dict())
        if layer.merged and (mode != "sparse_to_dense" or seed % 2):
            pruned = layer.weight[~mask]
            assert call in ("all", "save", "merge")
            if mode != "sparse_to_dense" or call == "merge":
                assert same_bits(pruned, torch.zeros_like(pruned))
    layer.unmerge()
    assert same_bits(layer.weight.detach().clone(), base)
    assert layer.kept is None


def test_order_and_number_of_adapters_add_up():
    sums = {}
    for order in (("a", "b"), ("b", "a")):
        model, _ = adapted("sparse_to_sparse", torch.float64, ("a", "b"))
        merge_all_lora_weights(model, adapters=order)
        sums[order] = weights(model)
    for name, w in sums["a", "b"].items():
        torch.testing.assert_close(w, sums["b", "a"][name], rtol=1e-14, atol=1e-14)


def test_merging_another_adapter_takes_the_first_one_out():
    model, _ = adapted("sparse_to_sparse", torch.float32, ("a", "b"))
    base = weights(model)
    merge_all_lora_weights(model, adapters=["b"])
    only_b = weights(model)
    merge_all_lora_weights(model, adapters=["a"])
    merge_all_lora_weights(model, adapters=["b"])
    assert same_bits(weights(model), only_b)
    unmerge_all_lora_weights(unmerge_all_lora_weights(model))
    assert same_bits(weights(model), base)


@pytest.mark.parametrize("preserve", [True, False])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("mode", MODES)
def test_state_and_copies_while_merged(mode, bits, preserve):
    model, masks = adapted(mode, base_bits=bits)
    model.eval()
    x, base, expected = batch(), weights(model), model(batch())
    merged(model, preserve_sparsity=preserve)
    acting, state = model(x), model.state_dict()
    assert len({t.untyped_storage().data_ptr() for t in state.values() if t.numel()}) == len(state)  # safetensors' rule
    fresh, _ = adapted(mode, base_bits=bits)
    learn(fresh, seed=9).eval()
    if preserve:  # into one that is merged differently
        merged(fresh)
    fresh.load_state_dict(state)
    for other in (fresh, copy.deepcopy(model)):
        assert torch.equal(other(x), acting)
        assert {layer.merged for layer in get_lora_layers(other).values()} == {("default",)}
        unmerge_all_lora_weights(other)
        assert same_bits(weights(other), base)
        assert torch.equal(other(x), expected)
        assert validate_sparsity_preserved(other, masks, 0)[0]
    assert torch.equal(model(x), acting)
    unmerge_all_lora_weights(model)
    merged(fresh)
    fresh.load_state_dict(model.state_dict())  # an unmerged state into a merged model
    assert not any(layer.merged for layer in get_lora_layers(fresh).values())
    assert torch.equal(fresh(x), expected)


def test_damaged_merged_states_are_refused():
    model, _ = adapted()
    merge_all_lora_weights(model)
    state = model.state_dict()
    fresh, _ = adapted()
    for change in (
        {"3.merged_adapters": torch.zeros(3, dtype=torch.uint8)},
        {"3.merged_adapters": torch.tensor(list(b'{"adapters": ["other"], "preserved": true}'), dtype=torch.uint8)},
        {"3.kept": torch.zeros(4)},
    ):
        with pytest.raises(RuntimeError, match="merged"):
            fresh.load_state_dict(state | change)
    with pytest.raises(RuntimeError, match="kept"):
        fresh.load_state_dict({k: v for k, v in state.items() if k != "3.kept"})


def test_a_plain_state_is_masked_when_it_is_loaded():
    from tests.pruning.lora_models import network

    model, masks = adapted()
    missing, unexpected = model.load_state_dict(network(seed=7).state_dict(), strict=False)
    assert not unexpected
    assert {key.split(".")[1] for key in missing} == {"bitmask", "lora_A", "lora_B"}
    assert validate_sparsity_preserved(model, masks, 0)[0]


def test_merge_onto_what_the_codes_stand_for():
    """Trap: an adapter trained on dequantized weights, merged into those they came from, adds an error it never saw."""
    torch.manual_seed(0)
    plain = nn.Linear(64, 32, bias=False)
    mask = torch.rand(32, 64) > 0.5
    original = torch.where(mask, plain.weight.detach(), 0)
    layer = apply_sparse_lora(plain, {"weight": mask}, config(base_bits=4, target_modules="Linear"))
    learn(layer, size=0.05).eval()
    values = layer.weight
    assert (values - original).abs().max() > 1e-3  # the error of four bits
    layer.merge()
    delta = torch.where(mask, 2.0 * layer.lora_B["default"] @ layer.lora_A["default"], 0)
    torch.testing.assert_close(layer.weight, values + delta)
    assert (layer.weight - (original + delta)).abs().max() > 1e-3
    x = torch.randn(4, 64)
    expected = layer(x)
    assert type(unload_sparse_lora(layer)) is nn.Linear
    torch.testing.assert_close(unload_sparse_lora(layer)(x), expected)


def test_what_the_mask_takes_away_is_measured_and_said():
    model, masks = adapted("sparse_to_dense", torch.float64)
    expected = {}
    for name, layer in get_lora_layers(model).items():
        w = layer.effective_weight()
        expected[name] = float(w[~masks[name]].norm() / w.norm())
    found = merge_loss(model)
    assert found == pytest.approx(expected)
    worst = max(expected, key=expected.get)
    total = torch.cat([layer.effective_weight().flatten() for layer in get_lora_layers(model).values()])
    lost = torch.cat([layer.effective_weight()[~masks[name]] for name, layer in get_lora_layers(model).items()])
    share = float(lost.norm() / total.norm())
    with pytest.warns(
        UserWarning, match=f"takes away {share:.3g} of what was trained.*'{worst}': {expected[worst]:.3g}"
    ):
        merge_all_lora_weights(model)
    unmerge_all_lora_weights(model)
    merge_all_lora_weights(model, preserve_sparsity=False)  # says nothing
    quiet, _ = adapted("sparse_to_dense", preserve_sparsity_on_merge=False)
    quiet.eval()
    y = quiet(batch())
    merge_all_lora_weights(quiet)
    torch.testing.assert_close(quiet(batch()), y)
    assert set(merge_loss(adapted("scale")[0]).values()) == {0.0}
    untrained = apply_sparse_lora(nn.Linear(4, 4), None, config("sparse_to_dense", target_modules="Linear"))
    merge_all_lora_weights(untrained)  # nothing is lost, nothing is said


def test_masks_hold_after_a_merge_and_not_after_a_dense_one():
    model, masks = adapted("sparse_to_dense")
    for preserve, held in ((True, True), (False, False)):
        merged(model, preserve_sparsity=preserve)
        for layer in get_lora_layers(model).values():
            layer.weight.requires_grad_(True)
        optimizer = torch.optim.SGD([layer.weight for layer in get_lora_layers(model).values()], lr=0.1, momentum=0.9)
        model(batch()).square().sum().backward()
        optimizer.step()
        assert validate_sparsity_preserved(model, masks, 0)[0] == held
        unmerge_all_lora_weights(model)
        assert validate_sparsity_preserved(model, masks, 0)[0]
        model.zero_grad()
        for layer in get_lora_layers(model).values():
            layer.weight.requires_grad_(False)


def test_memory_while_merged_is_the_kept_values():
    layer = apply_sparse_lora(
        nn.Linear(256, 128), {"weight": torch.rand(128, 256) > 0.7}, config(target_modules="Linear")
    )
    before = sum(b.nbytes for b in layer.buffers())
    layer.merge()
    assert sum(b.nbytes for b in layer.buffers()) - before == 4 * layer.mask.n_active


def test_training_goes_on_after_a_merge_and_back():
    model, masks = adapted("sparse_to_sparse", dropout=0.0)
    optimizer = torch.optim.Adam(lora_parameters(model), lr=1e-2)
    twin = copy.deepcopy(model)
    twins = torch.optim.Adam(lora_parameters(twin), lr=1e-2)
    for step in range(4):
        for one, its in ((model, optimizer), (twin, twins)):
            its.zero_grad()
            one(batch()).square().sum().backward()
            its.step()
        if step == 1:
            merge_all_lora_weights(model)
            model(batch())
            unmerge_all_lora_weights(model)
    assert same_bits(dict(model.state_dict()), dict(twin.state_dict()))
    assert validate_sparsity_preserved(model, masks, 0)[0]


def test_calls_without_adapters_say_so():
    with pytest.raises(ValueError, match="apply_sparse_lora puts them there"):
        merge_all_lora_weights(nn.Linear(2, 2))
    model, _ = adapted("sparse_to_sparse", torch.float32, ("a", "b"))
    with pytest.raises(ValueError, match="'c'; there are: a, b"):
        merge_all_lora_weights(model, adapters=["a", "c"])
    assert not any(layer.merged for layer in get_lora_layers(model).values())
    set_adapters(model, "a")
    merge_all_lora_weights(model)
    assert {layer.merged for layer in get_lora_layers(model).values()} == {("a",)}
    assert SparseMask(torch.ones(2, 2, dtype=torch.bool)).n_pruned == 0
