"""prune_model: every way through it, its report, and what it refuses."""

import json
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from resu.core.counting import keep_count
from resu.core.pattern import NM, Block, Unstructured, get_pattern
from resu.pruning.dsnot import dsnot
from resu.pruning.importance import importances
from resu.pruning.mask_generator import MaskGenerator
from resu.pruning.one_shot import prune_model
from resu.pruning.sparsegpt import reconstruct, sparsegpt
from tests.pruning import hf_models


def mlp(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8)).to(dtype)


def inputs(dtype=torch.float32, rows=40):
    return [torch.randn(rows, 16, generator=torch.Generator().manual_seed(1)).to(dtype)]


def loss_of(model, batch):
    return model(batch).float().square().mean()


ALL = sorted(importances)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("pattern", [None, "row", "tensor", "2:4", "block:4x2", "channel:0"])
def test_every_method_with_every_pattern(method, pattern):
    model = mlp()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    result = prune_model(model, 0.5, method, pattern=pattern, calibration=inputs(), loss_fn=loss_of)
    for name, mask in result.masks.items():
        weight = model.get_parameter(name)
        assert (weight[~mask] == 0).all()
        assert not torch.signbit(weight[~mask]).any()  # no -0.0
        expected = Unstructured(importances[method].scope) if pattern is None else get_pattern(pattern)
        assert expected.violations(mask) == 0
        assert int(mask.sum()) == expected.keep_for(mask.shape, 0.5)
        if method != "sparsegpt":
            assert torch.equal(weight[mask], before[name][mask])
    biases = [n for n in before if n.endswith("bias")]
    assert all(torch.equal(model.get_parameter(n), before[n]) for n in biases)
    assert json.loads(json.dumps(result.report, allow_nan=False)) == result.report


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk", "global", "lamp", "owl"])
@pytest.mark.parametrize("method", ["magnitude", "taylor", "wanda", "sparsegpt"])
def test_every_distribution_is_exact(method, distribution):
    model = mlp()
    result = prune_model(
        model, 0.6, method, distribution=distribution, calibration=inputs(), loss_fn=loss_of, pattern="tensor"
    )
    total = sum(m.numel() for m in result.masks.values())
    assert sum(int(m.sum()) for m in result.masks.values()) == keep_count(total, 0.6)


@given(sparsity=st.floats(0.0, 0.97).map(lambda s: round(s, 3)), rows=st.integers(1, 9), columns=st.integers(1, 9))
@settings(max_examples=25)
def test_counts_of_the_layerwise_methods_are_exact(sparsity, rows, columns):
    model = nn.Sequential(nn.Linear(columns, rows), nn.Linear(rows, columns))
    x = [torch.randn(11, columns)]
    with warnings.catch_warnings():  # tiny Hessians may need more damping
        warnings.simplefilter("ignore")
        for method, keep in (("wanda", None), ("sparsegpt", keep_count(rows * columns, sparsity))):
            result = prune_model(model, sparsity, method, calibration=x)
            first = rows * keep_count(columns, sparsity) if keep is None else keep
            assert int(result.masks["0.weight"].sum()) == first


def test_magnitude_is_what_the_mask_generator_gives():
    model = hf_models.gpt2()
    for sparsity, distribution in ((0.5, None), (0.7, "global"), ({"*.mlp.*": 0.6}, None)):
        expected = MaskGenerator(
            model, sparsity, "tensor", distribution=distribution, include="transformer.h.*"
        ).generate_masks()
        copied = hf_models.gpt2()
        result = prune_model(copied, sparsity, distribution=distribution, include="transformer.h.*")
        assert {n: m.tolist() for n, m in result.masks.items()} == {n: m.tolist() for n, m in expected.items()}


def test_solver_update_and_refinement_see_the_layers_hessian():
    """One layer, so that statistics are known: what comes out is what the functions give on them."""
    x = inputs()[0].double()
    w = mlp().double()[0].weight.detach()
    hessian, norm, mean = 2 / len(x) * x.T @ x, x.norm(dim=0), x.mean(dim=0)
    scores = w.abs() * norm
    kept = torch.zeros_like(w, dtype=torch.bool).scatter_(
        1, scores.argsort(dim=1, descending=True, stable=True)[:, :8], True
    )
    refined = dsnot(w, kept, input_mean=mean, input_norm=norm)
    solved = sparsegpt(w, hessian, pattern=Unstructured(), keep=w.numel() // 2)
    plain = w.abs() >= w.abs().flatten().sort(descending=True).values[w.numel() // 2 - 1]
    cases = {
        ("wanda", None, None): (kept, torch.where(kept, w, 0)),
        ("wanda", "dsnot", None): (refined, torch.where(refined, w, 0)),
        ("wanda", None, "sparsegpt"): (kept, reconstruct(w, hessian, kept).weight),
        ("wanda", "dsnot", "sparsegpt"): (refined, reconstruct(w, hessian, refined).weight),
        ("sparsegpt", None, None): (solved.mask, solved.weight),
        ("magnitude", None, "sparsegpt"): (plain, reconstruct(w, hessian, plain).weight),
    }
    for (method, refine, update), (mask, weight) in cases.items():
        model = mlp().double()
        result = prune_model(model, 0.5, method, refine=refine, update=update, calibration=[x], include="0")
        assert torch.equal(result.masks["0.weight"], mask), method
        torch.testing.assert_close(model[0].weight.detach(), weight, rtol=1e-9, atol=1e-12)
        entry = result.report["layers"][0]
        lost = ((weight - w) @ x.T).norm() / (w @ x.T).norm()
        if update or method == "sparsegpt":
            assert entry["error"] == pytest.approx(float(lost), rel=1e-6)
            assert (entry["error_from"], entry["damping"]) == ("hessian", 0.01)
        else:
            diagonal = ((weight - w) * norm).norm() / (w * norm).norm()
            assert entry["error"] == pytest.approx(float(diagonal), rel=1e-6)
            assert entry["error_from"] == "norms"


def test_an_update_makes_up_for_any_mask():
    errors = {}
    for method, update in (
        ("magnitude", "sparsegpt"),
        ("wanda", "sparsegpt"),
        ("sparsegpt", None),
        ("random", "sparsegpt"),
    ):
        report = prune_model(mlp(), 0.5, method, update=update, calibration=inputs()).report
        errors[method] = report["layers"][0]["error"]
    assert errors["sparsegpt"] < errors["random"]
    plain = prune_model(mlp(), 0.5, "wanda", calibration=inputs()).report["layers"][0]["error"]
    assert errors["wanda"] < plain


def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.Flatten(), nn.Linear(64, 5)
    )


@pytest.mark.parametrize("pattern", [None, "2:4", "row", "channel:0"])
@pytest.mark.parametrize(
    ("method", "refine", "update"),
    [("wanda", "dsnot", None), ("sparsegpt", None, None), ("ria", None, "sparsegpt")],
)
def test_convolutions(method, refine, update, pattern):
    model, x = conv_net(), torch.randn(6, 8, 4, 4)
    if refine and pattern == "channel:0":
        with pytest.raises(ValueError, match="refine='dsnot' swaps single weights and would break the pattern"):
            prune_model(model, 0.5, method, pattern=pattern, refine=refine, calibration=[x])
        return
    dense = conv_net()(x)
    result = prune_model(model, 0.5, method, pattern=pattern, refine=refine, update=update, calibration=[x])
    for name, mask in result.masks.items():
        assert mask.shape == model.get_parameter(name).shape
        if pattern:
            assert get_pattern(pattern).violations(mask) == 0
    assert (model(x) - dense).norm() < dense.norm()


@pytest.mark.parametrize("make", [hf_models.llama, hf_models.gpt2, hf_models.mixtral, hf_models.gpt_oss, hf_models.t5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_hugging_face_models_in_every_dtype(make, dtype, method):
    model = make().to(dtype)
    if make is hf_models.gpt_oss and dtype == torch.float16:
        model.config._experts_implementation = "eager"
    batches = hf_models.token_batches(2)
    if make is hf_models.t5:
        batches = [batch | {"decoder_input_ids": batch["input_ids"][:, :6]} for batch in batches]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some experts of tiny models see no token
        result = prune_model(model, 0.5, method, calibration=batches)
    assert result.report["actual"] == 0.5
    for name, mask in result.masks.items():
        weight = model.get_parameter(name)
        assert weight.dtype == dtype
        assert mask.shape == weight.shape
        assert (weight[~mask] == 0).all()
        assert torch.isfinite(weight).all()
    assert not any("embed" in name or "lm_head" in name or "norm" in name for name in result.masks)


def test_ties_are_kept_and_what_is_left_out_is_said():
    model = hf_models.llama(tie_word_embeddings=True)
    before = model.model.embed_tokens.weight.detach().clone()
    result = prune_model(model, 0.5, "wanda", calibration=hf_models.token_batches(1))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, before)
    skipped = result.report["skipped"]
    assert skipped.pop("norms and biases").startswith("5 vectors")
    assert skipped == {
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "output head tied to model.embed_tokens.weight",
    }
    pruned = sum(int((~m).sum()) for m in result.masks.values())
    assert result.report["total"] == pruned / sum(p.numel() for p in model.parameters())
    shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shared[1].weight = shared[0].weight
    result = prune_model(shared, 0.5, "wanda", calibration=[torch.randn(5, 4)])
    assert list(result.masks) == ["0.weight"]
    assert shared[1].weight is shared[0].weight


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("make", [hf_models.llama, hf_models.mixtral])
def test_trap_30_padding_changes_no_mask(make, method):
    padded, alone = hf_models.padded_and_not()
    masks = []
    for batches in (padded, alone):
        model = make().double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            masks.append(prune_model(model, 0.5, method, calibration=batches).masks)
    for name, mask in masks[0].items():
        assert torch.equal(mask, masks[1][name]), name


def test_trap_31_experts_without_tokens_are_pruned_by_magnitude_and_reported():
    name, batches = "model.layers.0.mlp.experts.gate_up_proj", [{"input_ids": torch.zeros(1, 1, dtype=torch.long)}]
    model = hf_models.mixtral(layers=1)
    before = model.model.layers[0].mlp.experts.gate_up_proj.detach().clone()
    with pytest.warns(UserWarning, match="saw no input") as caught:
        result = prune_model(model, 0.5, "wanda", calibration=batches)
    assert [str(w.message) for w in caught] == result.report["warnings"]
    (text,) = [t for t in result.report["warnings"] if name in t]
    idle = [int(e) for e in text.split("experts ")[1].split(" of")[0].split(", ")]
    assert len(idle) == 2
    for e in idle:
        order = before[e].abs().argsort(dim=1, descending=True, stable=True)[:, :8]
        expected = torch.zeros_like(before[e], dtype=torch.bool).scatter_(1, order, True)
        assert torch.equal(result.masks[name][e], expected)
    with pytest.warns(UserWarning, match="saw no input"):
        result = prune_model(hf_models.mixtral(layers=1), 0.5, "sparsegpt", calibration=batches)
    assert result.report["actual"] == 0.5
    assert all(p.isfinite().all() for p in model.parameters())


def test_trap_32_half_precision_activations_do_not_overflow():
    x = (inputs(rows=400)[0] * 20000).clamp(-60000, 60000).half()
    for method in ("wanda", "sparsegpt"):
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)).half()
        with torch.no_grad():
            model[0].weight.normal_(std=1e-3)
        result = prune_model(model, 0.5, method, calibration=[x])
        assert all(0 < layer["error"] < 1 for layer in result.report["layers"])


def test_trap_34_no_attention_mask_is_no_crash():
    ids = hf_models.token_batches(1)[0]["input_ids"]
    masks = []
    for attention in ({}, {"attention_mask": None}, {"attention_mask": torch.ones_like(ids)}):
        batch = {"input_ids": ids, **attention}
        masks.append(prune_model(hf_models.llama(), 0.5, "wanda", calibration=[batch]).masks)
    assert all(torch.equal(m, masks[0][n]) for other in masks[1:] for n, m in other.items())


def test_gradients_are_those_of_the_dense_model():
    model, batches = mlp(), inputs()
    expected = MaskGenerator(
        model, 0.5, importance_metric="taylor", dataloader=batches, loss_fn=loss_of
    ).generate_masks()
    for update in (None, "sparsegpt"):
        result = prune_model(mlp(), 0.5, "taylor", calibration=batches, loss_fn=loss_of, update=update)
        assert all(torch.equal(result.masks[n], m) for n, m in expected.items())


def test_global_budgets_with_inputs_come_from_the_dense_model():
    model, batches = mlp(), inputs()
    dense = MaskGenerator(
        model, 0.5, "tensor", "wanda", distribution="global", dataloader=batches, include="*"
    ).generate_masks()
    result = prune_model(mlp(), 0.5, "wanda", pattern="tensor", distribution="global", calibration=batches)
    assert [int(m.sum()) for m in result.masks.values()] == [int(m.sum()) for m in dense.values()]
    assert torch.equal(result.masks["0.weight"], dense["0.weight"])  # nothing before it is pruned


def test_random_masks_follow_the_seed():
    a, b, c = (prune_model(mlp(), 0.5, "random", seed=seed).masks["0.weight"] for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_registered_score_of_ones_own_goes_layer_by_layer():
    from resu.pruning.importance import register_importance

    @register_importance("test-mean", needs={"inputs", "grads"}, scope="row", replace=True)
    def by_mean(weight, stats):
        assert stats.grad is not None
        return weight.abs() * stats.input_mean.abs()

    try:
        result = prune_model(mlp(), 0.5, "test-mean", calibration=inputs(), loss_fn=loss_of)
        x, w = inputs()[0], mlp()[0].weight.detach()
        order = (w.abs() * x.mean(0).abs()).argsort(dim=1, descending=True, stable=True)[:, :8]
        assert torch.equal(result.masks["0.weight"], torch.zeros_like(w, dtype=torch.bool).scatter_(1, order, True))
    finally:
        importances._items.pop("test-mean")


def test_a_sparsity_per_layer():
    result = prune_model(mlp(), {"0": 0.75, "[02]": 0.25}, "wanda", calibration=inputs())
    assert {n: float(m.float().mean()) for n, m in result.masks.items()} == {"0.weight": 0.25, "2.weight": 0.75}
    assert result.report["skipped"]["4.weight"] == "matched by no glob of sparsity"
    assert result.report["sparsity"] == {"0": 0.75, "[02]": 0.25}


def test_nothing_to_remove_changes_nothing():
    for method in ("magnitude", "wanda", "sparsegpt"):
        model = mlp()
        result = prune_model(model, 0.0, method, calibration=inputs())
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), mlp().parameters(), strict=True))
        assert result.report["actual"] == 0


def test_progress_counts_layers():
    told = []
    prune_model(mlp(), 0.5, "wanda", calibration=inputs(), progress=lambda *a: told.append(a))
    assert told == [(1, 3, "0.weight"), (2, 3, "2.weight"), (3, 3, "4.weight")]
    told.clear()
    prune_model(mlp(), 0.5, "wanda", distribution="owl", calibration=inputs(), progress=lambda *a: told.append(a))
    assert [t[:2] for t in told] == [(i, 6) for i in range(1, 7)]
    told.clear()
    prune_model(mlp(), 0.5, distribution="global", progress=lambda *a: told.append(a))
    assert [t[:2] for t in told] == [(i, 6) for i in range(1, 7)]


def test_calibration_may_be_a_generator_one_tensor_or_one_mapping():
    x = inputs()[0]
    expected = prune_model(mlp(), 0.5, "wanda", calibration=[x]).masks
    for data in (x, (b for b in [x[:25], x[25:]]), [(x, torch.zeros(40))], {"input": x}, [{"input": x}]):
        masks = prune_model(mlp(), 0.5, "wanda", calibration=data).masks
        assert all(torch.equal(m, expected[n]) for n, m in masks.items())


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"method": "wnda"}, ValueError, "unknown importance 'wnda'; known: .*magnitude.*wanda"),
        ({"method": "wanda"}, ValueError, "method 'wanda' needs calibration data and there is none; pass calibration"),
        ({"method": "wanda", "calibration": []}, ValueError, "method 'wanda' needs calibration data and it holds no"),
        ({"update": "sparsegpt"}, ValueError, "update='sparsegpt' needs calibration"),
        ({"refine": "dsnot"}, ValueError, "refine='dsnot' needs calibration"),
        ({"refine": "swap"}, ValueError, "refine is None or 'dsnot', got 'swap'"),
        ({"update": "obs"}, ValueError, "update is None or 'sparsegpt', got 'obs'"),
        ({"method": "taylor", "calibration": inputs()}, ValueError, "method 'taylor' needs gradients; pass loss_fn"),
        ({"calibration": "wiki.txt", "method": "wanda"}, TypeError, "iterable of batches, got 'wiki.txt'"),
        ({"calibration": 3, "method": "wanda"}, TypeError, "iterable of batches, got int"),
        ({"sparsity": 1.0}, ValueError, r"sparsity must lie in \[0, 1\)"),
        ({"sparsity": 50}, ValueError, "a percentage"),
        ({"sparsity": "0.5"}, TypeError, "sparsity must be a number"),
        ({"sparsity": math.nan}, ValueError, "sparsity must lie"),
        ({"sparsity": None}, TypeError, "goes with an N:M pattern only"),
        ({"sparsity": {"0": 2.0}}, ValueError, "sparsity of '0' must lie"),
        ({"sparsity": {"9": 0.5}}, ValueError, "the glob '9' matches no layer"),
        ({"sparsity": {"0": 0.5}, "distribution": "erk"}, ValueError, "either one sparsity with a distribution"),
        ({"sparsity": 0.7, "pattern": "2:4"}, ValueError, "2:4 has sparsity 0.5 and no other, got 0.7"),
        ({"pattern": "2:4", "distribution": "erk"}, ValueError, "nothing for distribution='erk' to divide"),
        ({"pattern": "2;4"}, ValueError, "pattern"),
        ({"distribution": "even"}, ValueError, "unknown distribution 'even'; known"),
        ({"include": "fc"}, ValueError, "the glob 'fc' matches no weight"),
        (
            {"device": "meta", "method": "wanda", "calibration": inputs()},
            ValueError,
            "nothing can be computed on the meta",
        ),
    ],
)
def test_wrong_input_is_refused_before_anything_changes(options, error, text):
    model = mlp()
    with pytest.raises(error, match=text):
        prune_model(model, **{"sparsity": 0.5, **options})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), mlp().parameters(), strict=True))


def test_nm_takes_its_own_sparsity():
    assert prune_model(mlp(), None, pattern=NM(1, 4)).report["sparsity"] == 0.75
    assert prune_model(mlp(), None, "wanda", pattern="2:4", calibration=inputs()).report["actual"] == 0.5


def test_nan_is_named_by_layer_and_earlier_blocks_stay_whole():
    class Nan(nn.Module):
        def forward(self, x):
            return x * math.nan

    model = nn.Sequential(nn.Linear(16, 16), Nan(), nn.Linear(16, 8))
    for method in ("wanda", "sparsegpt"):
        with pytest.raises(ValueError, match=r"inputs of '2.weight' hold .* NaN"):
            prune_model(model, 0.5, method, calibration=inputs())
    broken = mlp()
    with torch.no_grad():
        broken[2].weight[0, 0] = math.inf
    for method in ("magnitude", "wanda", "sparsegpt"):
        with pytest.raises(ValueError, match=r"2\.weight"):
            prune_model(broken, 0.5, method, calibration=inputs())
    quantized = nn.Linear(2, 2)
    quantized.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"'weight' has dtype torch.int8; dequantize"):
        prune_model(quantized, 0.5)
    with pytest.raises(ValueError, match=r"'0.weight' is on the meta device"):
        prune_model(nn.Sequential(nn.Linear(2, 2, device="meta")), 0.5)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize(
    "name", ["layers.0.mlp.up_proj.weight", "layers.0.mlp.down_proj.weight", "embed_tokens.weight", "norm.weight"]
)
def test_nan_in_a_parameter_is_blamed_on_it_and_not_on_what_comes_behind_it(method, name):
    model = hf_models.llama()
    with torch.no_grad():
        model.get_parameter(f"model.{name}").view(-1)[3] = math.nan
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=rf"^'model\.{name}' holds 1 NaN or infinite"):
        prune_model(model, 0.5, method, calibration=hf_models.token_batches(1))
    assert all(torch.equal(p.nan_to_num(), before[n].nan_to_num()) for n, p in model.named_parameters())


@pytest.mark.parametrize("method", ["magnitude", "taylor", "wanda", "sparsegpt"])
def test_trap_12_no_block_spans_two_experts(method):
    """Experts of 48 and of 16 rows."""

    def pruned(pattern, **options):
        with warnings.catch_warnings():  # experts of tiny models that see no token
            warnings.simplefilter("ignore")
            model, batches = hf_models.mixtral(layers=1), hf_models.token_batches(1)
            options |= {"loss_fn": lambda m, b: m(**b).logits.square().mean()}
            return prune_model(model, 0.5, method, pattern=pattern, calibration=batches, **options)

    with pytest.raises(ValueError, match=r"down_proj' is a stack .* of 16 rows each.*divides 16 \(1, 2, 4, 8, 16\)"):
        pruned("block:3x5")
    assert "model.layers.0.mlp.experts.down_proj" not in pruned("block:3x5", exclude="*.down_proj").masks
    masks = pruned("block:4x5").masks
    for expert in masks["model.layers.0.mlp.experts.down_proj"]:
        assert Block(4, 5).violations(expert) == 0


def test_a_raised_damping_is_in_the_report():
    model = nn.Sequential(nn.Linear(64, 8))
    x = torch.randn(3, 64) * torch.logspace(-8, 4, 64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = prune_model(model, 0.5, "sparsegpt", calibration=[x]).report
    if caught:
        assert report["layers"][0]["damping"] > 0.01
    assert [str(w.message) for w in caught] == report["warnings"]


def test_report_of_a_block_pattern_counts_what_is_there():
    result = prune_model(
        nn.Sequential(nn.Linear(10, 9)), 0.5, "wanda", pattern=Block(4, 4), calibration=[torch.randn(5, 10)]
    )
    (layer,) = result.report["layers"]
    assert layer["kept"] == int(result.masks["0.weight"].sum())
    assert layer["sparsity"] == 1 - layer["kept"] / 90
    assert layer["shape"] == [9, 10]


def test_frozen_and_hooked_parameters_are_edited_in_place():
    model = mlp().requires_grad_(False)
    memory = [p.data_ptr() for p in model.parameters()]
    optimizer_view = list(model.parameters())
    prune_model(model, 0.5, "sparsegpt", calibration=inputs())
    assert [p.data_ptr() for p in model.parameters()] == memory
    assert all(a is b for a, b in zip(model.parameters(), optimizer_view, strict=True))
    assert not any(p.requires_grad for p in model.parameters())
    assert F.linear(inputs()[0], model[0].weight).isfinite().all()
