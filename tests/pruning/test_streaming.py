"""Masks of a state_dict or a checkpoint equal those of the same choices in memory, position by position."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from resu.core.counting import keep_count
from resu.core.mask_files import read_masks
from resu.core.pattern import NM, Unstructured, get_pattern
from resu.pruning.allocation import allocate, global_masks
from resu.pruning.importance import importances, register_importance
from resu.pruning.mask_generator import compute_masks_for_state_dict
from resu.pruning.statistics import Stats
from resu.pruning.streaming import MaskFile
from resu.pruning.weight_scores import WeightScores


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def state():
    return {
        "embed_tokens.weight": draw(30, 8),
        "layers.0.fc.weight": draw(24, 16, seed=1),
        "layers.0.fc.bias": draw(24),
        "layers.1.fc.weight": draw(10, 20, seed=2, dtype=torch.bfloat16),
        "layers.1.conv.weight": draw(6, 4, 3, 3, seed=3),
        "layers.1.experts.up": draw(3, 6, 8, seed=4, dtype=torch.float16),
        "lm_head.weight": draw(30, 8, seed=5),
        "ids": torch.arange(12).view(3, 4),
    }


LAYERS = ["layers.0.fc.weight", "layers.1.fc.weight", "layers.1.conv.weight", "layers.1.experts.up"]


def matrix(name, x):
    return x.flatten(0, 1) if name == "layers.1.experts.up" else x


def expected(state, sparsity, pattern=None, distribution=None, method="magnitude"):
    """The same by whole tensors and the public parts."""
    chosen = Unstructured(importances[method].scope) if pattern is None else get_pattern(pattern)
    scores = {n: importances[method](matrix(n, state[n]), Stats()) for n in LAYERS}
    shapes = {n: s.shape for n, s in scores.items()}
    if distribution is None:
        keeps = {n: chosen.keep_for(shape, sparsity) for n, shape in shapes.items()}
    else:
        keeps = allocate(distribution, shapes, sparsity, scores)
    return {n: chosen.select(scores[n], keeps[n]).view(state[n].shape) for n in LAYERS}


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("distribution", [None, "uniform", "er", "erk", "global", "lamp"])
@pytest.mark.parametrize("pattern", [None, "tensor", "row", "block:2x2", "channel:0"])
@pytest.mark.parametrize("method", ["magnitude", "lamp"])
def test_any_score_distribution_and_pattern_as_in_memory(state, workers, distribution, pattern, method):
    options = {"pattern": pattern, "distribution": distribution, "method": method}
    masks = compute_masks_for_state_dict(state, 0.6, workers=workers, **options)
    wanted = expected(state, 0.6, **options)
    assert list(masks) == LAYERS
    for name in LAYERS:
        assert masks[name].dtype == torch.bool
        assert torch.equal(masks[name], wanted[name]), name


@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_trap_12_fused_experts_are_pruned_within_each_experts_rows(state, sparsity):
    masks = compute_masks_for_state_dict(state, sparsity, pattern="2:4")
    for name, mask in masks.items():
        assert torch.equal(matrix(name, mask), NM(2, 4).mask(matrix(name, state[name]).abs(), 0.5))
    assert (masks["layers.1.experts.up"].view(-1, 4).sum(dim=1) == 2).all()


def test_three_dimensions_are_a_stack_unless_the_name_says_conv():
    weights = {"experts.w": draw(2, 4, 8), "conv1d.weight": draw(2, 4, 8)}
    masks = compute_masks_for_state_dict(weights, 0.5, pattern="row")
    assert (masks["experts.w"].sum(dim=2) == 4).all()
    assert (masks["conv1d.weight"].sum(dim=(1, 2)) == 16).all()


def test_random_scores_depend_on_seed_and_name_alone(state):
    first = compute_masks_for_state_dict(state, 0.5, "random", seed=1)
    alone = compute_masks_for_state_dict(state, 0.5, "random", seed=1, include="layers.1.fc", workers=2)
    other = compute_masks_for_state_dict(state, 0.5, "random", seed=2)
    assert torch.equal(first["layers.1.fc.weight"], alone["layers.1.fc.weight"])
    assert not torch.equal(first["layers.1.fc.weight"], other["layers.1.fc.weight"])


def test_a_score_of_ones_own_works_and_sees_whole_weights(state):
    seen = []

    @register_importance("by_mean", replace=True)
    def by_mean(weight, stats):
        seen.append(tuple(weight.shape))
        return (weight.float() - weight.float().mean()).abs()

    masks = compute_masks_for_state_dict(state, 0.7, "by_mean", distribution="global")
    scores = {n: by_mean(matrix(n, state[n]), None) for n in LAYERS}
    for name, mask in global_masks(scores, 0.7).items():
        assert torch.equal(matrix(name, masks[name]), mask)
    assert set(seen) == {(24, 16), (10, 20), (6, 4, 3, 3), (18, 8)}


def test_sparsities_by_glob(state):
    masks = compute_masks_for_state_dict(state, {"layers.1.fc": 0.25, "layers.*.fc": 0.75})
    assert {n: int(m.sum()) for n, m in masks.items()} == {"layers.0.fc.weight": 96, "layers.1.fc.weight": 150}


@settings(max_examples=60)
@given(data=st.data())
def test_global_masks_of_mixed_dtypes_with_ties(data):
    tensors = {}
    for i in range(data.draw(st.integers(1, 4))):
        dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]))
        x = draw(data.draw(st.integers(1, 9)), data.draw(st.integers(2, 9)), seed=i)
        tensors[f"l{i}.fc.weight"] = (x * data.draw(st.sampled_from([2.0, 1.0, 1e-3]))).mul(4).round().div(4).to(dtype)
    sparsity = data.draw(st.integers(0, 95)) / 100
    total = sum(x.numel() for x in tensors.values())
    if keep_count(total, sparsity) < len(tensors):
        return
    masks = compute_masks_for_state_dict(tensors, sparsity, distribution="global")
    for name, mask in global_masks({n: x.abs() for n, x in tensors.items()}, sparsity).items():
        assert torch.equal(masks[name], mask)


def test_trap_01_ties_keep_exactly_what_was_asked():
    masks = compute_masks_for_state_dict({"a.w": torch.ones(10, 10), "b.w": torch.ones(10, 10)}, 0.5)
    assert [int(m.sum()) for m in masks.values()] == [50, 50]
    masks = compute_masks_for_state_dict(
        {"a.w": torch.ones(10, 10), "b.w": torch.ones(10, 10)}, 0.4, distribution="global"
    )
    assert [int(m.sum()) for m in masks.values()] == [100, 20]
    assert masks["b.w"].view(-1).nonzero().view(-1).tolist() == list(range(20))


def test_trap_13_lm_head_is_left_out_and_a_glob_that_matches_nothing_is_an_error(state):
    assert "lm_head.weight" not in compute_masks_for_state_dict(state, 0.5)
    with pytest.raises(ValueError, match=r"lm_head\."):
        compute_masks_for_state_dict(state, 0.5, exclude=["lm_head."])


def test_masks_go_into_a_file_and_are_read_one_by_one(state, tmp_path):
    wanted = compute_masks_for_state_dict(state, 0.7, distribution="global")
    path = tmp_path / "masks.safetensors"
    for workers in (1, 3):
        masks = compute_masks_for_state_dict(state, 0.7, distribution="global", into=path, workers=workers)
        assert isinstance(masks, MaskFile)
        assert list(masks) == list(wanted)
        assert len(masks) == len(wanted)
        for name, mask in masks.items():
            assert torch.equal(mask, wanted[name])
        packed, _ = read_masks(path)  # verifies every checksum
        assert all(torch.equal(packed[n].mask, m) for n, m in wanted.items())
        with pytest.raises(FileExistsError, match="there already"):
            compute_masks_for_state_dict(state, 0.7, into=path)
        path.unlink()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="safetensors"):
        compute_masks_for_state_dict(state, 0.7, into=tmp_path / "masks.npz")


def test_a_folder_gives_the_masks_of_its_state_dict(state, tmp_path):
    save_file(state, tmp_path / "model.safetensors")
    found = compute_masks_for_state_dict(tmp_path, 0.8, distribution="erk")
    wanted = compute_masks_for_state_dict(state, 0.8, distribution="erk")
    assert set(found) == set(wanted)
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_trap_11_transposed_weights_by_glob_or_by_model_type(tmp_path):
    weight = draw(8, 12)
    by_glob = compute_masks_for_state_dict({"c_fc.weight": weight}, 0.5, pattern="row", transposed="c_fc.*")
    assert (by_glob["c_fc.weight"].sum(dim=0) == 4).all()
    by_module = compute_masks_for_state_dict({"c_fc.weight": weight}, 0.5, pattern="row", transposed="c_fc")
    assert torch.equal(by_module["c_fc.weight"], by_glob["c_fc.weight"])
    save_file({"h.0.mlp.c_fc.weight": weight, "h.0.other.weight": weight.clone()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    masks = compute_masks_for_state_dict(tmp_path, 0.5, pattern="row")
    assert torch.equal(masks["h.0.mlp.c_fc.weight"], by_glob["c_fc.weight"])
    assert (masks["h.0.other.weight"].sum(dim=1) == 6).all()
    with pytest.raises(ValueError, match="matches no tensor"):
        compute_masks_for_state_dict({"c_fc.weight": weight}, 0.5, transposed="c_proj.*")


def test_a_transposed_stack_goes_there_and_back():
    scores = WeightScores(None, ["w"], importances["magnitude"], transposed=frozenset({"w"}))

    class One:
        def shape(self, name):
            return torch.Size((2, 3, 4))

        def read(self, name):
            return torch.arange(24.0).view(2, 3, 4)

    object.__setattr__(scores, "weights", One())
    whole = scores.whole("w")
    assert whole.shape == scores.matrix_shape("w") == (8, 3)
    assert torch.equal(scores.stored("w", whole), torch.arange(24.0).view(2, 3, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "options", [{}, {"pattern": "row"}, {"pattern": "2:4"}, {"method": "random"}, {"distribution": "lamp"}]
)
def test_input_nan_and_inf_name_the_tensor(state, bad, options):
    state["layers.1.fc.weight"][2, 3] = bad
    with pytest.raises(ValueError, match=r"layers\.1\.fc\.weight"):
        compute_masks_for_state_dict(state, 0.5, **options)


def test_input_quantized_weights_are_left_out_or_refused(state):
    state["layers.2.fc.weight"] = draw(4, 4).to(torch.float8_e4m3fn)
    assert "layers.2.fc.weight" not in compute_masks_for_state_dict(state, 0.5)
    with pytest.raises(ValueError, match=r"layers\.2\.fc\.weight.*dequantize"):
        compute_masks_for_state_dict(state, 0.5, include="layers.2.fc")


@pytest.mark.parametrize("workers", [0, -1, 1.5, True, None])
def test_input_workers(state, workers):
    with pytest.raises(ValueError, match="workers"):
        compute_masks_for_state_dict(state, 0.5, workers=workers)


def test_progress_reaches_its_end(state):
    said = []
    compute_masks_for_state_dict(state, 0.5, progress=lambda *step: said.append(step), workers=2)
    total = sum(state[n].numel() for n in LAYERS)
    assert said[-1] == (total, total, "masks")


def test_input_what_is_no_state_dict(tmp_path):
    with pytest.raises(TypeError, match="state_dict or a path"):
        compute_masks_for_state_dict([1], 0.5)
    with pytest.raises(ValueError, match=r"'a\.weight' is on the meta device"):
        compute_masks_for_state_dict({"a.weight": torch.ones(2, 2, device="meta")}, 0.5)
    with pytest.raises(FileNotFoundError, match="make it first"):
        compute_masks_for_state_dict({"a.weight": torch.ones(2, 2)}, 0.5, into=tmp_path / "no" / "m.safetensors")


@pytest.mark.parametrize(("transposed", "rows"), [(None, 6), ("*.up", 8)])
def test_trap_12_no_block_spans_two_experts(state, transposed, rows):
    options = {"include": "*.up", "transposed": transposed}
    with pytest.raises(ValueError, match=rf"'layers.1.experts.up' is a stack .* of {rows} rows .* blocks of 5 rows"):
        compute_masks_for_state_dict(state, 0.5, pattern="block:5x1", **options)
    mask = compute_masks_for_state_dict(state, 0.5, pattern="block:2x1", **options)["layers.1.experts.up"]
    for expert in mask.transpose(1, 2) if transposed else mask:
        assert get_pattern("block:2x1").violations(expert) == 0
