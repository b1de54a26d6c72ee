"""Layers fitted to what is left: the least-squares solution, and never worse than masking on the same data."""

import pytest
import torch

pytest.importorskip("transformers")

from resu.integrations.shrink.exactness import random_batch
from resu.integrations.shrink.families import sites_of
from resu.integrations.shrink.plan import Fractions, choose_units, kept_counts
from resu.integrations.shrink.refit import fitted_weights, put_weights
from resu.integrations.shrink.scores import score_units
from resu.integrations.shrink.transform import shrink_transformer
from tests.integrations.shrink_models import make


def inputs_of(model, batches, site):
    caught = []
    handle = model.base_model.get_submodule(site.outer).register_forward_pre_hook(
        lambda m, args: caught.append(args[0])
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    real = torch.cat([batch["attention_mask"].bool() for batch in batches])
    return torch.cat(caught)[real].double()


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "qwen2"])
def test_the_fit_is_that_of_lstsq(kind):
    model = make(kind)
    batches = [random_batch(model, seed) for seed in range(12)]
    units = choose_units(score_units(model, "l2"), kept_counts(sites_of(model), Fractions(0.4, 0.5)))
    fitted = fitted_weights(model, units, batches)
    for site in sites_of(model):
        inputs = inputs_of(model, batches, site)
        layer = model.base_model.get_submodule(site.outer)
        weight = (layer.weight.T if kind == "gpt2" else layer.weight).detach().double()
        outputs = inputs @ weight.T
        kept = inputs[:, site.columns.of(units[site.name])]
        ours, bias = fitted[site.outer]
        assert ours.dtype == torch.float32
        got = kept @ ours.double().T
        if layer.bias is not None:
            outputs = outputs + layer.bias.detach().double()
            got = got + bias
            kept = torch.cat([kept, torch.ones(len(kept), 1)], dim=1)
        best = kept @ torch.linalg.lstsq(kept, outputs).solution
        error, least = (float((outputs - x).square().mean()) for x in (got, best))
        masked = outputs - inputs[:, site.columns.of(units[site.name])] @ weight[:, site.columns.of(units[site.name])].T
        assert least <= error + 1e-12
        assert error < 1.1 * least + 1e-3 * float(outputs.square().mean())  # damping costs a little
        assert error < float(masked.square().mean())


def test_nothing_to_fit_changes_nothing():
    model = make("llama")
    units = {site.name: torch.arange(site.count) for site in sites_of(model)}
    assert fitted_weights(model, units, [random_batch(model)]) == {}
    # All columns kept in another way: a fit of a whole layer gives it back.
    before = model.model.layers[0].mlp.down_proj.weight.clone()
    put_weights(model, {"layers.0.mlp.down_proj": (before.double(), None)})
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, before)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_fitted_layers_are_found_where_blocks_have_moved(kind):
    model, plain = make(kind), make(kind)
    batches = [random_batch(model, seed) for seed in range(8)]
    options = {"heads": 0.4, "ffn": 0.5, "depth": 2, "method": "activation", "batches": batches, "round_to": 1}
    fitted = shrink_transformer(model, **options, update="least-squares")
    removed = shrink_transformer(plain, **options)
    assert fitted.blocks == removed.blocks
    assert len(fitted.blocks) == 2
    assert fitted.verified <= 1e-9
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, plain.get_parameter(n))}
    ends = ("output.dense.weight", "output.dense.bias", "down_proj.weight", "o_proj.weight")
    assert changed == {n for n, _ in model.named_parameters() if n.endswith(ends) and (".layer" in n)}


def test_updates_need_data():
    with pytest.raises(ValueError, match="calibration"):
        shrink_transformer(make("bert"), ffn=0.5, update="least-squares")
    with pytest.raises(ValueError, match="known: least-squares"):
        shrink_transformer(make("bert"), ffn=0.5, update="obs")
