"""Scores of heads, neurons and blocks against their definitions, element by element."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers")

import transformers

from resu.integrations.shrink.activity import block_influences
from resu.integrations.shrink.exactness import random_batch
from resu.integrations.shrink.families import sites_of
from resu.integrations.shrink.scores import Calibration, score_units, unit_scores
from tests.integrations.shrink_models import make

KINDS = ["bert", "distilbert", "llama", "qwen2", "gpt2"]


def batches(model, count=3):
    return [random_batch(model, seed) for seed in range(count)]


def columns_of(model, site):
    """The reading layer's weight `[out, in]`, and the columns of each unit."""
    layer = model.base_model.get_submodule(site.outer)
    weight = layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight
    size = site.columns.size
    return weight.detach(), [range(unit * size, (unit + 1) * size) for unit in range(site.count)]


def rows_of_units(model, site):
    """For each unit the rows of all weights that feed it, as lists of vectors."""
    found = [[] for _ in range(site.count)]
    for rows in site.inner:
        layer = model.base_model.get_submodule(rows.module)
        weight = (layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight).detach()
        for unit in range(site.count):
            found[unit] += [weight[rows.start + unit * rows.size + i] for i in range(rows.size)]
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "order"), [("l1", 1), ("l2", 2)])
def test_norms_go_over_all_weights_of_a_unit(kind, method, order):
    model = make(kind)
    scores = score_units(model, method)
    for site in sites_of(model):
        weight, columns = columns_of(model, site)
        rows = rows_of_units(model, site)
        for unit in range(site.count):
            values = torch.cat([*rows[unit], weight[:, list(columns[unit])].reshape(-1)]).double()
            assert scores[site.name][unit] == pytest.approx(float(values.norm(order)), rel=1e-5)


def test_each_weight_of_a_block_belongs_to_one_unit():
    model = make("qwen3")
    seen = {}
    for site in sites_of(model):
        for rows in site.inner:
            for unit in range(site.count):
                seen.setdefault(rows.module, []).extend(rows.of(torch.tensor([unit])).tolist())
    for name, rows in seen.items():
        assert sorted(rows) == list(range(model.base_model.get_submodule(name).weight.shape[0])), name
    assert len(seen) == 5 * 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_activation_is_the_mean_square_of_what_a_unit_adds(kind, dtype, error):
    model = make(kind).to(dtype)
    data = batches(model)
    scores = score_units(model, "activation", Calibration(data))
    inputs, site_list = {}, sites_of(model)
    handles = [
        model.base_model.get_submodule(site.outer).register_forward_pre_hook(
            lambda module, args, name=site.name: inputs.setdefault(name, []).append(args[0])
        )
        for site in site_list
    ]
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for handle in handles:
        handle.remove()
    real = torch.cat([batch["attention_mask"].bool() for batch in data])
    for site in site_list:
        weight, columns = columns_of(model, site)
        values = torch.cat(inputs[site.name])[real]
        for unit in range(0, site.count, 7):
            added = values[:, list(columns[unit])].double() @ weight[:, list(columns[unit])].double().T
            assert scores[site.name][unit] == pytest.approx(float(added.square().sum(1).mean()), rel=error)


def gates_of(model):
    """Factors, 1 each, on every unit, through which gradients flow."""
    gates, handles = {}, []
    for site in sites_of(model):
        gate = gates[site.name] = torch.ones(site.count, requires_grad=True)

        def hook(module, args, gate=gate, site=site):
            return (args[0] * gate.repeat_interleave(site.columns.size), *args[1:])

        handles.append(model.base_model.get_submodule(site.outer).register_forward_pre_hook(hook))
    return gates, handles


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_taylor_is_the_mean_size_of_the_derivative_by_a_gate(kind):
    """Michel et al. 2019, eq. 2: the expectation over samples of |dL/dξ| at ξ = 1."""
    model = make(kind)
    data = batches(model)
    flags = [p.requires_grad for p in model.parameters()]
    scores = score_units(model, "taylor", Calibration(data))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    gates, handles = gates_of(model)
    wanted = {name: torch.zeros(len(gate)) for name, gate in gates.items()}
    for batch in data:
        for row in range(len(batch["input_ids"])):
            tokens = int(batch["attention_mask"][row].sum())
            ids = batch["input_ids"][row : row + 1, :tokens]
            loss = model(input_ids=ids, labels=ids).loss
            for name, grad in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
                wanted[name] += grad.abs() / 6
    for handle in handles:
        handle.remove()
    for name in wanted:
        torch.testing.assert_close(scores[name].float(), wanted[name], rtol=1e-3, atol=1e-6)


def test_taylor_of_an_encoder_is_the_length_of_the_change_of_its_embedding():
    """With random directions z, E|z·v| is ‖v‖·√(2/π): many draws give the length of each derivative."""
    model = make("bert")
    data = [random_batch(model, 0)]
    draws = 400
    scores = score_units(model, "taylor", Calibration(data * draws))
    gates, handles = gates_of(model)
    states = model(**data[0]).last_hidden_state
    weights = data[0]["attention_mask"].unsqueeze(-1).float()
    embedding = F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)
    lengths = {name: torch.zeros(2, len(gate)) for name, gate in gates.items()}
    for row in range(2):
        for index in range(embedding.shape[1]):
            grads = torch.autograd.grad(embedding[row, index], list(gates.values()), retain_graph=True)
            for name, grad in zip(gates, grads, strict=True):
                lengths[name][row] += grad.square()
    for handle in handles:
        handle.remove()
    for name, squares in lengths.items():
        wanted = squares.sqrt().mean(0) * (2 / torch.pi) ** 0.5
        torch.testing.assert_close(scores[name].float(), wanted, rtol=0.25, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_influence_is_one_minus_the_cosine_of_input_and_output(kind):
    model = make(kind)
    data = batches(model)
    found = block_influences(model, data)
    caught = []

    def watch(module, args, options, output):
        caught.append((args[0] if args else options["hidden_states"], output))

    blocks = next(m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)
    for block in blocks:
        block.register_forward_hook(watch, with_kwargs=True)
    turned, count = torch.zeros(4, dtype=torch.float64), 0
    for batch in data:
        caught.clear()
        with torch.no_grad():
            model(**batch)
        real = batch["attention_mask"].bool()
        count += int(real.sum())
        for index, (before, after) in enumerate(caught):
            for a, b in zip(before[real].double(), after[real].double(), strict=True):
                turned[index] += 1 - float(a @ b / (a.norm() * b.norm()))
    torch.testing.assert_close(found, turned / count, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "electra-discriminator"])
def test_padding_counts_for_nothing(kind):
    # Of a discriminator there is a logit per token: what it says of padding must not count either.
    model = make(kind) if kind == "llama" else transformers.ElectraForPreTraining(make("electra").config).eval()
    batch = random_batch(model)
    other = dict(batch, input_ids=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7))
    for method in ("activation", "taylor"):
        a, b = (score_units(model, method, Calibration([data])) for data in (batch, other))
        for name in a:
            torch.testing.assert_close(a[name], b[name])
    torch.testing.assert_close(block_influences(model, [batch]), block_influences(model, [other]))


def test_unknown_scores_and_missing_data_are_refused():
    model = make("bert")
    with pytest.raises(ValueError, match="known: activation, l1, l2, random, taylor"):
        score_units(model, "wanda")
    for method in unit_scores:
        if unit_scores[method].needs_data:
            with pytest.raises(ValueError, match="looks at data"):
                score_units(model, method)
    model.encoder.layer[1].intermediate.dense.weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.output"):
        score_units(model, "l2")


def test_frozen_models_and_modes_are_as_before():
    model = make("llama").train()
    model.model.layers[1].eval()  # as a user may hold a part of a model
    modes = {name: module.training for name, module in model.named_modules()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for method in unit_scores:
        score_units(model, method, Calibration(batches(model)))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.config.use_cache
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
