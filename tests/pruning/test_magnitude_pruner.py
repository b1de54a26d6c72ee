"""MagnitudePruner against plain sorting, position by position."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resu.core.pattern import NM
from resu.modules.convert import convert_to_resu
from resu.pruning.mask_generator import MaskGenerator
from resu.pruning.pruners import MagnitudePruner


def _model():
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))


def _kept(weight, keep):
    """The `keep` largest |w|; ties keep the lower index: a stable sort of Python floats."""
    order = sorted(range(weight.numel()), key=lambda i: (-abs(weight.view(-1)[i].item()), i))
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[order[:keep]] = True
    return mask.view(weight.shape)


def _keep(n, sparsity):
    return n - math.floor(n * Fraction(str(sparsity)))


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.9, 0.99])
def test_local_keeps_the_largest_of_each_layer_and_zeroes_in_place(sparsity):
    model = _model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = MagnitudePruner(sparsity).prune(model)
    assert set(masks) == {"0.weight", "2.weight"}
    for name, p in model.named_parameters():
        if name in masks:
            expected = _kept(before[name], _keep(p.numel(), sparsity))
            assert torch.equal(masks[name], expected)
            assert torch.equal(p, torch.where(expected, before[name], torch.zeros(())))
            assert not torch.signbit(p[~expected]).any()  # +0.0
        else:
            assert torch.equal(p, before[name])


def test_global_is_one_ranking_over_all_layers():
    model = _model()
    with torch.no_grad():
        model[2].weight.mul_(2)
    joined = torch.cat([p.detach().reshape(-1) for n, p in model.named_parameters() if n.endswith("weight")])
    masks = MagnitudePruner(0.87, scope="global").prune(model)
    expected = _kept(joined, _keep(300, 0.87))
    assert torch.equal(torch.cat([masks["0.weight"].view(-1), masks["2.weight"].view(-1)]), expected)


def test_trap_01_ties_do_not_change_the_count():
    model = nn.Linear(10, 10, bias=False)
    nn.init.constant_(model.weight, 0.25)
    mask = MagnitudePruner(0.5).prune(model)["weight"]
    assert torch.equal(mask.view(-1), torch.arange(100) < 50)


def test_trap_09_global_ranking_empties_no_layer():
    model = _model()
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
    masks = MagnitudePruner(0.9, scope="global").prune(model)
    assert int(masks["0.weight"].sum()) == 1
    assert sum(int(m.sum()) for m in masks.values()) == 30


def test_sparsity_per_glob_leaves_others_dense():
    masks = MagnitudePruner({"2": 0.75}).prune(_model())
    assert {n: int(m.sum()) for n, m in masks.items()} == {"2.weight": 25}


@pytest.mark.parametrize("pattern", ["row", "block:5x2", "channel:0"])
def test_patterns_are_those_of_the_mask_generator(pattern):
    model = _model()
    expected = MaskGenerator(model, 0.6, pattern).generate_masks()
    masks = MagnitudePruner(0.6, pattern=pattern).prune(model)
    assert all(torch.equal(masks[n], expected[n]) for n in expected)


def test_nm_is_legal_and_has_one_sparsity():
    model = nn.Linear(16, 8)
    mask = MagnitudePruner(0.5, pattern="2:4").prune(model)["weight"]
    assert NM(2, 4).violations(mask) == 0
    assert int(mask.sum()) == 64
    with pytest.raises(ValueError, match=r"2:4 has sparsity 0\.5 and no other"):
        MagnitudePruner(0.7, pattern="2:4")
    with pytest.raises(ValueError, match=r"2:4 has sparsity 0\.5 and no other"):
        MagnitudePruner({"*": 0.7}, pattern="2:4")
    assert MagnitudePruner(None, pattern="1:4").sparsity == 0.75
    with pytest.raises(ValueError, match="in every layer, so there is nothing for distribution='global'"):
        MagnitudePruner(0.5, scope="global", pattern="2:4")


def test_other_scores_take_calibration():
    model, x = _model(), torch.randn(16, 10)
    masks = MagnitudePruner(0.5, importance="wanda", calibration=[x]).prune(model)
    assert masks["0.weight"].sum(dim=1).unique().tolist() == [5]  # Wanda compares within rows
    slopes = MagnitudePruner(
        0.5, importance="taylor", calibration=[x], loss_fn=lambda m, batch: m(batch).square().mean()
    ).prune(_model())
    assert int(slopes["0.weight"].sum()) == 100


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 7), st.integers(1, 9)), min_size=1, max_size=4),
    st.lists(st.integers(0, 99), min_size=1, max_size=4),
    st.sampled_from(["local", "global"]),
    st.sampled_from(["magnitude", "random"]),
)
def test_masks_within_masks_are_exact_and_nested(shapes, percents, scope, importance):
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in shapes)
    sizes = [m * n for m, n in shapes]
    pruner = MagnitudePruner(0.5, scope=scope, importance=importance)
    masks = None
    for percent in sorted(percents):
        sparsity = percent / 100
        if scope == "global" and _keep(sum(sizes), sparsity) < len(sizes):
            with pytest.raises(ValueError, match="one each"):
                pruner.prune(model, sparsity, within=masks)
            return
        pruner.seed += 1  # other random scores: being inside is the pruner's doing
        with torch.no_grad():
            for layer in model:
                layer.weight.copy_(torch.randn_like(layer.weight))  # as if trained without masks
        found = pruner.prune(model, sparsity, within=masks)
        kept = [int(m.sum()) for m in found.values()]
        if scope == "local":
            assert kept == [_keep(n, sparsity) for n in sizes]
        else:
            assert sum(kept) == _keep(sum(sizes), sparsity)
            assert min(kept) >= 1
        if masks is not None:
            assert all(not bool((found[n] & ~masks[n]).any()) for n in found)
        masks = found


def test_a_layer_that_is_sparser_already_stays():
    model = _model()
    pruner = MagnitudePruner(0.9)
    first = pruner.prune(model)
    again = pruner.prune(model, 0.5, within=first)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert pruner.history[-1]["newly_pruned"] == 0


def test_history_and_stats_say_what_happened():
    model, pruner = _model(), MagnitudePruner(0.5)
    with pytest.raises(ValueError, match=r"call prune\(model\) first"):
        _ = pruner.stats
    pruner.prune(model)
    masks = pruner.prune(model, 0.8, within=pruner.masks)
    first, second = pruner.history
    assert (first["sparsity"], first["kept"], first["newly_pruned"]) == (0.5, 150, 150)
    assert (second["sparsity"], second["kept"], second["newly_pruned"]) == (0.8, 60, 90)
    assert second["layers"]["2.weight"] == {"kept": 20, "numel": 100, "sparsity": 0.8}
    assert pruner.stats.kept == sum(int(m.sum()) for m in masks.values())
    assert "0.weight" in str(pruner.stats)


def test_resurrection_layers_take_the_mask():
    model = convert_to_resu(_model())
    MagnitudePruner(0.5).prune(model)
    assert [model[0].sparsity, model[2].sparsity] == [0.5, 0.5]


def test_trap_10_a_tie_is_pruned_once():
    model = nn.Module()
    model.a, model.b = nn.Linear(6, 6), nn.Linear(6, 6)
    model.b.weight = model.a.weight
    masks = MagnitudePruner(0.5).prune(model)
    assert list(masks) == ["a.weight"]
    assert model.a.weight is model.b.weight
    assert int((model.b.weight == 0).sum()) == 18


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"sparsity": 1.0}, ValueError, r"must lie in \[0, 1\)"),
        ({"sparsity": -0.1}, ValueError, r"must lie in \[0, 1\)"),
        ({"sparsity": "0.5"}, TypeError, "must be a number"),
        ({"sparsity": None}, TypeError, "goes with an N:M pattern only"),
        ({"distribution": "fair"}, ValueError, "unknown distribution 'fair'; known"),
        ({"distribution": {"0": 0.5}}, TypeError, "as the sparsity, not as the distribution"),
        ({"sparsity": float("nan")}, ValueError, r"must lie in \[0, 1\)"),
        ({"sparsity": 50}, ValueError, "a percentage"),
        ({"sparsity": {"0": 1.5}}, ValueError, "sparsity of '0'"),
        ({"sparsity": {"0": 0.5}, "scope": "global"}, ValueError, "either one sparsity"),
        ({"scope": "layer"}, ValueError, "'local' or 'global', got 'layer'"),
        ({"scope": "global", "distribution": "erk"}, ValueError, "one or the other"),
        ({"importance": "magnitud"}, ValueError, "unknown importance 'magnitud'; known"),
        ({"pattern": "2x4"}, ValueError, "unknown pattern"),
    ],
)
def test_what_cannot_be_is_said_at_once(options, error, said):
    with pytest.raises(error, match=said):
        MagnitudePruner(**options)


def test_nan_weights_are_refused_and_nothing_changes():
    model = _model()
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"'2\.weight'.* hold 1 NaN"):
        MagnitudePruner(0.5).prune(model)
    assert all(torch.equal(p, before[n]) or p.isnan().any() for n, p in model.state_dict().items())
    assert torch.equal(model[0].weight, before["0.weight"])


def test_only_modules_are_pruned():
    with pytest.raises(TypeError, match=r"prunes a torch\.nn\.Module, got Tensor"):
        MagnitudePruner(0.5).prune(torch.ones(3, 3))


def test_a_glob_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="fc9"):
        MagnitudePruner(0.5, include="fc9").prune(_model())
