"""Sparse LoRA: the documented flow, the three modes against dense references, what is frozen and what trains."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from resu.core.mask import SparseMask
from resu.pruning.sparse_lora import (
    SparseLoRAConfig,
    apply_sparse_lora,
    get_lora_layers,
    lora_parameters,
    merge_all_lora_weights,
    unload_sparse_lora,
    validate_sparsity_preserved,
)
from tests.pruning.lora_models import MODES, adapted, batch, config, learn, network, random_masks, same_bits


def test_the_documented_flow():
    from resu.pruning import mask_generator
    from resu.pruning.mask_generator import compute_unstructured_mask
    from resu.pruning.sparse_lora import (
        SparseLoRAConfig,
        apply_sparse_lora,
        merge_all_lora_weights,
        validate_sparsity_preserved,
    )

    assert mask_generator.MaskGenerator
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))
    masks = compute_unstructured_mask(model, sparsity=0.5, importance_metric="magnitude")
    settings = SparseLoRAConfig(
        r=16, alpha=32, dropout=0.05, target_modules=["Linear"], sparsity_mode="sparse_to_dense", initial_sparsity=0.5,
        maintain_sparsity=True, preserve_sparsity_on_merge=True,
    )  # fmt: skip
    model = apply_sparse_lora(model, masks, settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, y = torch.randn(64, 20), torch.randint(4, (64,))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with pytest.warns(UserWarning, match=r"takes away 0\.\d+ of what was trained"):
        merge_all_lora_weights(model, preserve_sparsity=True)
    ok, report = validate_sparsity_preserved(model, masks, tolerance=1e-6)
    assert ok
    assert report["global"]["total_violations"] == 0
    assert report["global"]["violation_rate"] == 0.0


def test_defaults_are_the_contract():
    assert vars(SparseLoRAConfig()) == {
        "r": 16, "alpha": 32, "dropout": 0.05, "target_modules": ["Linear"], "sparsity_mode": "sparse_to_dense",
        "initial_sparsity": 0.5, "maintain_sparsity": True, "preserve_sparsity_on_merge": True, "exclude_modules": [],
        "base_bits": None, "train_norms": False, "train_biases": False, "train_head": [],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"r": 0}, "r must be"), ({"r": True}, "r must be"), ({"alpha": 0}, "alpha"), ({"alpha": "8"}, "alpha"),
        ({"alpha": float("nan")}, "alpha"), ({"dropout": 1.0}, "dropout"), ({"base_bits": 3}, "base_bits"),
        ({"sparsity_mode": "dense"}, "known: sparse_to_dense"), ({"initial_sparsity": 1.0}, "initial_sparsity"),
        ({"target_modules": []}, "empty"), ({"train_head": [1]}, "globs"), ({"ranks": 4}, "ranks"),
    ],
)  # fmt: skip
def test_illegal_settings(options, error):
    with pytest.raises((ValueError, TypeError), match=error):
        SparseLoRAConfig(**options)


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("mode", MODES)
def test_forward_is_the_formula(mode, bits):
    model, masks = adapted(mode, torch.float64, ("a", "b"), base_bits=bits)
    model.eval()
    plain = network(dtype=torch.float64)
    with torch.no_grad():
        for name, layer in get_lora_layers(model).items():
            w, mask = layer.weight.detach(), masks[name]  # of a packed base: what its codes stand for
            assert same_bits(w[~mask], torch.zeros_like(w[~mask]))
            delta = sum(2.0 * layer.lora_B[k].detach() @ layer.lora_A[k].detach() for k in ("a", "b"))
            delta = (delta.t() if isinstance(layer.__class__.transposed, bool) and layer.transposed else delta).reshape(
                w.shape
            )
            k = {"sparse_to_dense": torch.ones_like(w), "sparse_to_sparse": mask.double(), "scale": w}[mode]
            expected = w + k * delta
            torch.testing.assert_close(layer.effective_weight(), expected)
            plain.get_parameter(name).copy_(expected)
            if layer.bias is not None:
                plain.get_parameter(name.replace("weight", "bias")).copy_(layer.bias)
    x = batch(torch.float64)
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_the_formula(mode):
    model, masks = adapted(mode, torch.float64)
    model.eval()
    x = batch(torch.float64).requires_grad_()
    model(x).square().sum().backward()
    again = copy.deepcopy(model)
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    of_x = x.grad.clone()
    x.grad = None

    def dense(x):
        for name, module in again.named_children():
            if f"{name}.weight" in masks and f"{name}.weight" in get_lora_layers(again):
                w, mask = module.weight, masks[f"{name}.weight"]
                delta = 2.0 * module.lora_B["default"] @ module.lora_A["default"]
                delta = (delta.t() if module.transposed else delta).reshape(w.shape)
                k = {"sparse_to_dense": torch.ones_like(w), "sparse_to_sparse": mask.double(), "scale": w}[mode]
                x = module._product(x, w + k * delta)
            else:
                x = module(x)
        return x

    again.zero_grad()
    dense(x).square().sum().backward()
    torch.testing.assert_close(of_x, x.grad)
    assert found.keys() == {n for n, p in again.named_parameters() if p.grad is not None}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, again.get_parameter(name).grad)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("mode", MODES)
def test_base_is_frozen_and_only_adapters_move(mode, bits):
    model, masks = adapted(mode, base_bits=bits)
    parameters = lora_parameters(model)
    assert {id(p) for p in parameters} == {
        id(p) for layer in get_lora_layers(model).values() for f in (layer.lora_A, layer.lora_B) for p in f.values()
    }
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)  # all of them, to be hard on it
    for _ in range(3):
        optimizer.zero_grad()
        model(batch()).square().sum().backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        assert same_bits(value, before[name]) == (".lora_" not in name), name
    assert validate_sparsity_preserved(model, masks, 0)[0]


def test_held_even_if_the_base_trains():
    model, masks = adapted("sparse_to_dense")
    for layer in get_lora_layers(model).values():
        layer.weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(batch()).square().sum().backward()
    optimizer.step()
    ok, report = validate_sparsity_preserved(model, masks, 0)
    assert ok, report["global"]
    free, masks = adapted("sparse_to_dense", maintain_sparsity=False)
    assert validate_sparsity_preserved(free, masks, 0)[0]
    for layer in get_lora_layers(free).values():
        layer.weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(free.parameters(), lr=0.1)
    free(batch()).square().sum().backward()
    optimizer.step()
    assert not validate_sparsity_preserved(free, masks, 0)[0]


@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_starts_as_nothing(mode):
    model = network()
    masks = random_masks(model)
    for name, mask in masks.items():
        SparseMask(mask).apply_(model.get_parameter(name))
    expected = model(batch())
    model = apply_sparse_lora(model, masks, config(mode, dropout=0.5))
    assert torch.equal(model(batch()), expected)


def test_dropout_of_components_is_unbiased_and_of_training_only():
    layer = apply_sparse_lora(
        nn.Linear(6, 5), {"weight": torch.rand(5, 6) > 0.5}, config(r=8, dropout=0.5, target_modules=["Linear"])
    )
    learn(layer)
    x = torch.randn(4, 6)
    layer.eval()
    exact = layer(x)
    assert torch.equal(layer(x), exact)
    layer.train()
    draws = torch.stack([layer(x) for _ in range(600)]).detach()
    assert draws.std(dim=0).max() > 0.05
    torch.testing.assert_close(draws.mean(dim=0), exact.detach(), atol=0.35, rtol=0)
    dense = apply_sparse_lora(
        nn.Linear(6, 5),
        {"weight": torch.rand(5, 6) > 0.5},
        config("sparse_to_dense", dropout=0.5, target_modules="Linear"),
    )
    learn(dense)
    assert not torch.equal(dense(x), dense(x))


@pytest.mark.parametrize("mode", MODES)
def test_checkpointed_activations_draw_the_same_dropout(mode):
    model, _ = adapted(mode, dropout=0.4)
    x = batch().requires_grad_()
    gradients = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(3)
        model.zero_grad()
        run(x).sum().backward()
        gradients.append([p.grad.clone() for p in lora_parameters(model)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("mode", MODES)
def test_autocast_and_low_precision_bases(mode, bits):
    model, _ = adapted(mode, base_bits=bits)
    model.eval()
    exact = model(batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(batch())
    torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.15)
    y.float().sum().backward()
    assert {p.grad.dtype for p in lora_parameters(model)} == {torch.float32}
    low, _ = adapted(mode, torch.bfloat16, base_bits=bits)
    assert {p.dtype for p in lora_parameters(low)} == {torch.float32}
    low.eval()
    out = low(batch(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0.1, atol=0.25 if bits else 0.15)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("mode", MODES)
def test_one_graph_when_compiled(mode, bits):
    torch._dynamo.reset()
    model, _ = adapted(mode, base_bits=bits, dropout=0.0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        model.zero_grad()
        y = run(batch())
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in lora_parameters(model))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


@pytest.mark.parametrize("bits", [None, 4])
def test_copies_pickles_and_moves(bits):
    model, masks = adapted(base_bits=bits)
    model.eval()
    expected = model(batch())
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (copied, pickled):
        assert torch.equal(other(batch()), expected)
        assert validate_sparsity_preserved(other, masks, 0)[0]
    learn(copied, seed=5)
    assert torch.equal(model(batch()), expected)
    double = copy.deepcopy(model).double()
    torch.testing.assert_close(double(batch(torch.float64)).float(), expected)
    half = copy.deepcopy(model).to(torch.bfloat16)
    if bits:
        assert {layer.scale.dtype for layer in get_lora_layers(half).values()} == {torch.float32}
    torch.testing.assert_close(half(batch(torch.bfloat16)).float(), expected, rtol=0.1, atol=0.15)


def test_a_copy_holds_its_own_weight():
    model, masks = adapted("sparse_to_dense")
    copied = copy.deepcopy(model)
    layer = get_lora_layers(copied)["3.weight"]
    layer.weight.requires_grad_(True)
    optimizer = torch.optim.SGD([layer.weight], lr=1.0)
    copied(batch()).sum().backward()
    optimizer.step()
    assert validate_sparsity_preserved(copied, masks, 0)[0]
    assert not torch.equal(layer.weight, get_lora_layers(model)["3.weight"].weight)


def test_packed_base_is_small_and_reads_as_dense():
    layer = apply_sparse_lora(
        nn.Linear(256, 128, bias=False),
        {"weight": torch.rand(128, 256) > 0.5},
        config(base_bits=4, target_modules="Linear"),
    )
    held = sum(b.nbytes for n, b in layer.named_buffers() if n != "_like")
    n, kept = 128 * 256, layer.mask.n_active
    assert held == (kept + 1) // 2 + n // 8 + 2 * 4 * 128
    assert layer._parameters["weight"] is None
    assert layer.weight.shape == (128, 256)
    assert not layer.weight.requires_grad
    assert "sparsity=" in repr(layer)
    assert "base_bits=4" in repr(layer)


def test_encoder_layers_do_not_go_round_the_adapters():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=True)
    settings = config(target_modules=["linear1", "linear2"])
    model = learn(apply_sparse_lora(model, None, settings)).eval()
    x = torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with_gradients = model(x, src_key_padding_mask=padding).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[~padding], with_gradients[~padding])
    merge_all_lora_weights(model)
    unload_sparse_lora(model)
    assert not any(m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[~padding], with_gradients[~padding])


def test_unloaded_layers_are_plain_and_share_their_parameters():
    model, masks = adapted("sparse_to_sparse")
    model.eval()
    weights = {name: layer.weight for name, layer in get_lora_layers(model).items()}
    seen = []
    model[3].register_forward_hook(lambda *args: seen.append(1))
    expected = model(batch())
    merge_all_lora_weights(model)
    plain = unload_sparse_lora(model)
    assert [type(m).__name__ for m in plain] == ["Conv2d", "ReLU", "Flatten", "Linear", "Conv1D", "LayerNorm", "Linear"]
    assert all(plain.get_parameter(name) is weight for name, weight in weights.items())
    assert torch.equal(plain(batch()), expected)
    assert len(seen) == 2
    assert validate_sparsity_preserved(plain, masks, 0)[0]
    assert list(plain.state_dict()) == list(network().state_dict())
    base, _ = adapted("sparse_to_sparse")
    unload_sparse_lora(base)
    for name, mask in masks.items():
        assert torch.equal(base.get_parameter(name), torch.where(mask, network().get_parameter(name), 0))
