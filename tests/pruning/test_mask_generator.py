"""From a model to masks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from resu.core.counting import keep_count
from resu.core.pattern import NM, Block
from resu.pruning.importance import importances, register_importance
from resu.pruning.magnitude_pruner import MagnitudePruner
from resu.pruning.mask_generator import (
    MaskGenerator,
    compute_random_mask,
    compute_structured_mask,
    compute_unstructured_mask,
)
from resu.pruning.sensitivity import sensitivity_scan
from tests.core.test_layers import Conv1D, TransposedExperts


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 3))


def counts(masks):
    return {name: int(mask.sum()) for name, mask in masks.items()}


def test_each_layer_keeps_its_exact_count_of_the_largest():
    model = network()
    masks = MaskGenerator(model, 0.29).generate_masks()
    assert counts(masks) == {"0.weight": 26, "2.weight": 114, "4.weight": 22}
    for name, mask in masks.items():
        w = model.get_parameter(name).detach().abs()
        assert mask.dtype == torch.bool
        assert w[~mask].max() <= w[mask].min()


def test_the_model_is_not_changed():
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(4, 1, 4, 4)
    MaskGenerator(model, 0.5, importance_metric="wanda", dataloader=[x]).generate_masks()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_global_pruning_is_one_ranking():
    model = network()
    masks = compute_unstructured_mask(model, 0.9, "magnitude", global_pruning=True)
    weights = [model.get_parameter(name).detach().abs() for name in masks]
    flat = torch.cat([w.view(-1) for w in weights])
    kept = torch.cat([m.view(-1) for m in masks.values()])
    assert int(kept.sum()) == keep_count(flat.numel(), 0.9)
    assert flat[~kept].max() <= flat[kept].min()


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk", "global", "lamp", "owl"])
def test_distributions_have_exact_totals(distribution):
    masks = MaskGenerator(network(), 0.77, distribution=distribution).generate_masks()
    assert sum(counts(masks).values()) == keep_count(sum(m.numel() for m in masks.values()), 0.77)


def test_sparsity_by_glob_leaves_the_others_without_a_mask():
    masks = compute_unstructured_mask(network(), {"2": 0.5, "4.weight": 0.9})
    assert counts(masks) == {"2.weight": 80, "4.weight": 3}
    with pytest.raises(ValueError, match="the glob 'fc' matches no layer"):
        MaskGenerator(network(), {"fc": 0.5})
    with pytest.raises(ValueError, match="either one sparsity"):
        MaskGenerator(network(), {"2": 0.5}, distribution="erk")


def test_trap_35_wanda_competes_within_rows_by_default():
    model, x = network(), torch.randn(32, 1, 4, 4)
    masks = MaskGenerator(model, 0.5, importance_metric="wanda", dataloader=[x]).generate_masks()
    features = model[1](model[0](x)).detach()
    w = model[2].weight.detach().abs() * features.norm(dim=0)
    for row, kept in zip(w, masks["2.weight"], strict=True):
        assert set(kept.nonzero().view(-1).tolist()) == set(row.argsort(descending=True)[:8].tolist())
    whole = MaskGenerator(model, 0.5, "tensor", "wanda", dataloader=[x]).generate_masks()["2.weight"]
    assert not torch.equal(whole, masks["2.weight"])
    assert whole.sum(dim=1).unique().numel() > 1


def test_scores_from_gradients_over_data():
    model, x, y = network(), torch.randn(8, 1, 4, 4), torch.randint(0, 3, (8,))
    options = {"dataloader": [(x, y)], "loss_fn": lambda m, b: F.cross_entropy(m(b[0]), b[1])}
    masks = compute_unstructured_mask(model, 0.5, "taylor", **options)
    F.cross_entropy(model(x), y).backward()
    score = (model[4].weight * model[4].weight.grad).abs().detach()
    assert score[~masks["4.weight"]].max() <= score[masks["4.weight"]].min()
    assert torch.equal(compute_unstructured_mask(model, 0.5, "taylor")["4.weight"], masks["4.weight"])


@pytest.mark.parametrize("method", ["2:4", "block:2x2", "channel:0", "row", NM(1, 4), Block(4, 1)])
def test_patterns_by_name_and_object(method):
    sparsity = 0.75 if method == NM(1, 4) else 0.5
    generator = MaskGenerator(network(), sparsity, method, include="2")
    mask = generator.generate_masks()["2.weight"]
    assert generator.pattern.violations(mask) == 0
    assert int(mask.sum()) == generator.pattern.keep_for(mask.shape, sparsity)


def test_trap_11_patterns_on_conv1d_see_outputs_first():
    model = nn.ModuleDict({"c": Conv1D(6, 8)})
    mask = MaskGenerator(model, 0.5, "row").generate_masks()["c.weight"]
    assert mask.shape == (8, 6)
    assert mask.sum(dim=0).tolist() == [4] * 6  # each output keeps half of its inputs
    assert mask.is_contiguous()
    groups = MaskGenerator(model, 0.5, "2:4").generate_masks()["c.weight"]
    assert NM(2, 4).violations(groups.t()) == 0


def test_n_of_m_has_its_own_sparsity_and_takes_no_other():
    model = nn.Sequential(nn.Linear(8, 4))
    masks = MaskGenerator(model, None, "1:4").generate_masks()
    assert masks["0.weight"].sum(dim=1).tolist() == [2] * 4  # trap 6: one of four stays
    assert torch.equal(MaskGenerator(model, 0.75, "1:4").generate_masks()["0.weight"], masks["0.weight"])
    assert torch.equal(MaskGenerator(model, {"0": 0.75}, "1:4").generate_masks()["0.weight"], masks["0.weight"])
    with pytest.raises(ValueError, match=r"1:4 has sparsity 0.75 and no other, got 0.5"):
        MaskGenerator(model, 0.5, "1:4")
    with pytest.raises(ValueError, match=r"2:4 has sparsity 0.5 and no other, got 0.75"):
        MaskGenerator(model, {"0": 0.75}, "2:4")
    with pytest.raises(TypeError, match="sparsity=None goes with an N:M pattern only"):
        MaskGenerator(model, None)


@pytest.mark.parametrize("distribution", ["global", "erk", "uniform", lambda shapes, sparsity, scores: {}])
def test_what_cannot_be_divided_is_refused_with_the_reason(distribution):
    with pytest.raises(ValueError, match="2:4 keeps 2 of 4 in every layer, so there is nothing for distribution="):
        MaskGenerator(network(), 0.5, "2:4", distribution=distribution)
    with pytest.raises(ValueError, match=r"a sparsity per layer leaves distribution=.* nothing to divide"):
        MaskGenerator(network(), {"2": 0.5}, distribution=distribution)


@pytest.mark.parametrize("dim", [0, 1])
def test_structured_masks_are_whole_channels_by_mean_score(dim):
    model = nn.ModuleDict({"fc": nn.Linear(6, 8), "conv": nn.Conv2d(6, 4, 3), "c": Conv1D(8, 6)})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    masks = compute_structured_mask(model, 0.5, dim)
    for name, mask in masks.items():
        weight = before[name].abs()
        if name == "c.weight":
            weight, mask = weight.t(), mask.t()
        channels, scores = mask.movedim(dim, 0).flatten(1), weight.movedim(dim, 0).flatten(1).mean(1)
        kept = channels.all(1)
        assert torch.equal(kept, channels.any(1))
        assert int(kept.sum()) == len(kept) // 2
        assert scores[kept].min() >= scores[~kept].max()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    one = compute_structured_mask(model, {"fc": 0.99}, dim, "random", seed=3)
    assert int(one["fc.weight"].sum()) == (6 if dim == 0 else 8)


@pytest.mark.parametrize("dim", [2, -1, True, "0", None])
def test_structured_masks_have_outputs_and_inputs_alone(dim):
    with pytest.raises(ValueError, match="dim must be 0"):
        compute_structured_mask(network(), 0.5, dim)


def test_trap_03_a_kept_weight_may_be_zero():
    model = nn.Sequential(nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight.zero_()
    assert counts(MaskGenerator(model, 0.5).generate_masks()) == {"0.weight": 16}


def test_trap_10_tied_weights_get_one_mask():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    for name in ("0", "2"):
        assert list(MaskGenerator(model, 0.5, include=name).generate_masks()) == ["0.weight"]
    assert counts(compute_unstructured_mask(model, 0.75, global_pruning=True)).keys() == {"0.weight", "1.weight"}


@pytest.mark.parametrize("is_transposed", [False, True])
def test_trap_12_fused_experts_are_pruned_each_by_its_rows(is_transposed):
    model = TransposedExperts(is_transposed)
    mask = MaskGenerator(model, 0.5, "row", include="up").generate_masks()["up"]
    assert mask.shape == (3, 4, 8)
    rows = mask.sum(dim=1 if is_transposed else 2)
    assert rows.unique().tolist() == [2 if is_transposed else 4]


@pytest.mark.parametrize(("is_transposed", "rows"), [(False, 4), (True, 8)])
def test_trap_12_no_block_spans_two_experts(is_transposed, rows):
    model = TransposedExperts(is_transposed)
    message = rf"'up' is a stack .* of {rows} rows each, and blocks of 3 rows would span two"
    with pytest.raises(ValueError, match=message):
        MaskGenerator(model, 0.5, "block:3x1", include="up")
    with pytest.raises(ValueError, match=message):
        MagnitudePruner(0.5, pattern="block:3x1", include="up").compute_masks(model)
    with pytest.raises(ValueError, match=message):
        sensitivity_scan(model, lambda m: 1.0, pattern="block:3x1", include="up")
    mask = MaskGenerator(model, 0.5, f"block:{rows}x1", include="up").generate_masks()["up"]
    for expert in mask.transpose(1, 2) if is_transposed else mask:
        assert Block(rows, 1).violations(expert) == 0
    both = nn.ModuleDict({"experts": model, "fc": nn.Linear(4, 4)})
    assert list(MaskGenerator(both, {"fc": 0.5}, "block:3x1", include="*").generate_masks()) == ["fc.weight"]


def test_trap_13_an_excluded_layer_has_no_mask():
    assert "4.weight" not in MaskGenerator(network(), 0.5, exclude="4").generate_masks()
    with pytest.raises(ValueError, match=r"the glob '4.' matches no weight"):
        MaskGenerator(network(), 0.5, exclude="4.")


def test_random_masks_repeat_by_seed():
    first, again, other = (compute_random_mask(network(), 0.8, seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)
    assert counts(first) == {n: keep_count(m.numel(), 0.8) for n, m in first.items()}


def test_a_score_of_ones_own_is_taken_by_name():
    @register_importance("smallest", replace=True)
    def smallest(weight, stats):
        return -weight.abs()

    try:
        model = network()
        mask = compute_unstructured_mask(model, 0.5, "smallest")["2.weight"]
        w = model[2].weight.detach().abs()
        assert w[mask].max() <= w[~mask].min()
    finally:
        del importances._items["smallest"]


def test_bad_input_is_said_at_once():
    with pytest.raises(ValueError, match="unknown importance 'size'"):
        MaskGenerator(network(), 0.5, importance_metric="size")
    with pytest.raises(ValueError, match="unknown pattern 'structured'"):
        MaskGenerator(network(), 0.5, method="structured")
    with pytest.raises(ValueError, match="must lie in"):
        MaskGenerator(network(), 1.0)
    with pytest.raises(TypeError, match="must be a number"):
        MaskGenerator(network(), "0.5")
    with pytest.raises(ValueError, match="matches no weight"):
        MaskGenerator(network(), 0.5, exclude="head")
    with pytest.raises(ValueError, match="unknown distribution"):
        MaskGenerator(network(), 0.5, distribution="even")
    with pytest.raises(TypeError, match="distribution must be a name or a function"):
        MaskGenerator(network(), 0.5, distribution=["erk"])
    with pytest.raises(TypeError, match=r"give \{glob: sparsity\} as the sparsity"):
        MaskGenerator(network(), 0.5, distribution={"2": 0.5})


def test_input_nan_weights_are_an_error_that_names_the_layer():
    model = network()
    with torch.no_grad():
        model[4].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"scores of '4.weight' hold 1 NaN"):
        compute_unstructured_mask(model, 0.5)
