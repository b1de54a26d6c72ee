"""Every kind of fault is found, by its name, and nothing is found where nothing is wrong."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from resu import save_checkpoint
from resu.core.counting import keep_count
from resu.core.mask import SparseMask
from resu.core.mask_files import write_masks
from resu.core.pattern import NM, Unstructured
from resu.formats.checks import check_counts, check_mask, check_weight, expected_counts
from resu.formats.compressed import write_compressed
from resu.formats.validate import validate
from resu.modules.convert import convert_to_resu, get_resu_modules


def pruned(sparsity=0.5, pattern=None):
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(8, 16, generator=generator) for name in ("fc1.weight", "fc2.weight")}
    pattern = pattern or Unstructured()
    masks = {name: SparseMask(pattern.mask(weight.abs(), sparsity)) for name, weight in state.items()}
    for name, mask in masks.items():
        mask.apply_(state[name])
    state["fc1.bias"] = torch.zeros(8)
    return state, masks


@pytest.fixture
def model(tmp_path):
    """A folder as pruning writes it."""
    state, masks = pruned()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    write_masks(masks, tmp_path / "masks.safetensors", {"method": "magnitude"})
    layers = [{"name": name, "kept": mask.n_active} for name, mask in masks.items()]
    (tmp_path / "pruning.json").write_text(json.dumps({"layers": layers}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return tmp_path


def change(folder, **tensors):
    path = folder / "model.safetensors"
    state = load_file(path)
    for name, tensor in tensors.items():
        name = name.replace("_", ".")
        state[name] = tensor(state[name]) if callable(tensor) else tensor
    save_file({name: tensor.contiguous() for name, tensor in state.items() if tensor is not None}, path)


def findings(path, **options):
    found = validate(path, **options)
    json.dumps(found)
    assert found["ok"] == (not found["violations"])
    return {(each["name"], each["problem"]) for each in found["violations"]}


# -- nothing is wrong ----------------------------------------------------------------------------------


def test_a_whole_model_is_ok(model):
    found = validate(model, sparsity=0.5)
    assert found["ok"]
    assert found["violations"] == found["notes"] == []
    assert found["kind"] == "model"
    assert found["total"] == {"numel": 256, "kept": 128, "sparsity": 0.5, "masks": 2, "checksums": 0}
    row = {row["name"]: row for row in found["tensors"]}["fc1.weight"]
    assert row == {
        "name": "fc1.weight",
        "shape": [8, 16],
        "dtype": "float32",
        "layout": "dense",
        "numel": 128,
        "kept": 64,
        "sparsity": 0.5,
        "minus_zeros": 0,
        "checksum": False,
        "ok": True,
    }


@pytest.mark.parametrize("layout", ["sparse-bitmask", "sparse-24-bitmask"])
def test_a_model_in_a_sparse_layout_is_ok_and_its_checksums_are_verified(layout, tmp_path):
    state, masks = pruned(pattern=NM(2, 4))
    write_compressed(state, masks, tmp_path / "m", layout=layout)
    found = validate(tmp_path / "m", sparsity=0.5, pattern="2:4")
    assert found["violations"] == []
    assert {row["layout"] for row in found["tensors"]} == {layout, "dense"}
    assert found["total"]["checksums"] == 3


@pytest.mark.parametrize("ending", ["pt", "npz", "safetensors"])
def test_a_mask_file_is_ok(ending, tmp_path):
    masks = pruned()[1]
    write_masks(masks, tmp_path / f"m.{ending}")
    found = validate(tmp_path / f"m.{ending}", sparsity=0.5, masks=tmp_path / f"m.{ending}")
    assert found["ok"]
    assert found["kind"] == "masks"
    assert found["total"]["checksums"] == 2


@pytest.mark.parametrize("layout", ["dense", "bitmask"])
def test_a_checkpoint_is_ok_also_with_resurrection_layers(layout, tmp_path):
    state, masks = pruned()
    save_checkpoint(state, tmp_path / "m.safetensors", masks=masks, layout=layout)
    found = validate(tmp_path / "m.safetensors", sparsity=0.5)
    assert found["ok"]
    assert found["kind"] == "checkpoint"
    network = convert_to_resu(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    for layer in get_resu_modules(network).values():
        layer.prune_by_magnitude(0.5)
    network[0].enter_resu_mode()  # θ stands where the mask prunes
    masks = {f"{name}.weight": layer.mask for name, layer in get_resu_modules(network).items()}
    save_checkpoint(network, tmp_path / "n.safetensors", masks=masks)
    assert findings(tmp_path / "n.safetensors", sparsity=0.5) == set()


def test_progress_is_told(model):
    told = []
    validate(model, progress=lambda *args: told.append(args))
    assert [(done, total) for done, total, _ in told] == [(1, 3), (2, 3), (3, 3)]


def test_trap_08_minus_zeros_are_zeros_and_are_told(model):
    change(model, fc1_weight=lambda w: torch.where(w == 0, -0.0, w))
    found = validate(model)
    assert found["ok"]
    assert found["notes"] == ["fc1.weight: 64 pruned positions hold -0.0, which is a zero"]
    assert {row["name"]: row["minus_zeros"] for row in found["tensors"]}["fc1.weight"] == 64


# -- something is --------------------------------------------------------------------------------------


def test_every_fault_of_a_model_has_its_name(model):
    change(
        model,
        fc1_weight=lambda w: torch.where(w == 0, 1.0, w),
        fc2_weight=lambda w: w[:4].clone(),
        fc1_bias=torch.tensor([1.0, float("nan"), float("inf")]),
    )
    assert findings(model) == {
        ("fc1.weight", "is not zero at 64 of 64 positions its mask prunes"),
        ("fc2.weight", "has shape (4, 16), its mask (8, 16)"),
        ("fc1.bias", "holds 2 NaN or infinite values"),
    }
    assert [row["ok"] for row in validate(model)["tensors"]] == [False, False, False]


def test_a_nan_under_a_mask_is_not_zero(model):
    change(model, fc1_weight=lambda w: torch.where(w == 0, float("nan"), w))
    assert ("fc1.weight", "is not zero at 64 of 64 positions its mask prunes") in findings(model)


def test_masks_without_weights_and_reports_that_differ(model):
    change(model, fc2_weight=None)
    assert findings(model) == {("fc2.weight", "has a mask, but no weight of that name is stored")}
    report = {"layers": [{"name": "fc1.weight", "kept": 3}, {"name": "fc3.weight", "kept": 3}]}
    (model / "pruning.json").write_text(json.dumps(report))
    assert {
        ("fc1.weight", "keeps 64 weights, pruning.json says 3"),
        ("fc3.weight", "is in pruning.json, but has no mask"),
    } < findings(model)
    (model / "pruning.json").write_text("[")
    assert any(name == "pruning.json" and "is damaged" in problem for name, problem in findings(model))


def test_a_missing_shard_is_a_finding(model):
    (model / "model.safetensors").rename(model / "a.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(model / "a.safetensors"), "b.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (name, problem), *more = findings(model)
    assert not more
    assert name == str(model)
    assert "shard b.safetensors is missing" in problem
    with pytest.raises(FileNotFoundError):
        validate(model / "no")


def test_a_damaged_mask_file_is_told_once(model):
    report = {"layers": [{"name": "fc1.weight", "kept": 64}, {"name": "fc2.weight", "kept": 64}]}
    (model / "pruning.json").write_text(json.dumps(report))
    assert findings(model) == set()
    data = bytearray((model / "masks.safetensors").read_bytes())
    data[-1] ^= 1
    (model / "masks.safetensors").write_bytes(data)
    assert [name for name, _ in findings(model)] == ["masks.safetensors"]


def test_counts_are_exact(model):
    assert findings(model, sparsity=0.6) == {
        ("all masks", "keep 128 of 256 weights, sparsity 0.5; sparsity 0.6 keeps 112")
    }
    masks = {"a": SparseMask(torch.arange(100) < 50)}
    assert check_counts(masks, 0.5) == []
    assert check_counts(masks, 0.505) == []  # floor(50.5) are pruned
    assert check_counts(masks, 0.51) == ["keep 50 of 100 weights, sparsity 0.5; sparsity 0.51 keeps 49"]


@given(
    shapes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4),
    percent=st.integers(0, 99),
)
def test_every_way_to_count_exactly_is_known(shapes, percent):
    sparsity = percent / 100
    expected = expected_counts(shapes, sparsity)
    sizes = [int(np.prod(shape)) for shape in shapes]
    assert sum(keep_count(size, sparsity) for size in sizes) in expected
    total = sum(sizes)
    assert total - (total * percent) // 100 in expected
    assert sum(Unstructured("row").keep_for(shape, sparsity) for shape in shapes) in expected
    assert len(expected) <= 4


def test_patterns_are_checked_in_the_orientation_of_the_layer(tmp_path):
    right = NM(2, 4).mask(torch.rand(8, 16), 0.5)
    for mask, options, wrong in (
        (right, {}, False),
        (right.t().contiguous(), {}, True),
        (right.t().contiguous(), {"transposed": True}, False),
        (right, {"transposed": True}, True),
        (right.view(2, 4, 16), {}, False),  # a stack of experts
        (right.view(2, 4, 16).transpose(1, 2).contiguous(), {}, False),
        (~right & (torch.rand(8, 16) < 0.5), {}, False),  # fewer than two are allowed
    ):
        assert bool(check_mask(SparseMask(mask), NM(2, 4), **options)) == wrong
    broken = right.clone()
    broken[0, :4] = broken[3, 4:8] = True
    write_masks({"w": SparseMask(broken)}, tmp_path / "m.npz")
    assert findings(tmp_path / "m.npz", pattern="2:4") == {("w", "breaks 2:4 in 2 places")}
    # The Conv1D of GPT-2 is stored as [in, out].
    save_file({"h.0.attn.c_attn.weight": right.t().float().contiguous()}, tmp_path / "model.safetensors")
    write_masks({"h.0.attn.c_attn.weight": SparseMask(right.t())}, tmp_path / "masks.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert findings(tmp_path, pattern="2:4")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert findings(tmp_path, pattern="2:4") == set()


def test_a_mask_that_keeps_nothing_is_wrong(tmp_path):
    write_masks({"w": SparseMask(torch.zeros(2, 2, dtype=torch.bool))}, tmp_path / "m.npz")
    assert findings(tmp_path / "m.npz") == {("w", "keeps nothing")}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int8])
def test_weights_of_every_dtype_are_checked(dtype):
    mask = SparseMask(torch.tensor([[True, False, False]]))
    assert check_weight(torch.tensor([[5, 0, 0]]).to(dtype), mask) == ([], 0)
    assert check_weight(torch.tensor([[5, 0, 1]]).to(dtype), mask)[0] == [
        "is not zero at 1 of 2 positions its mask prunes"
    ]
    minus = int(dtype.is_floating_point)
    assert check_weight(torch.tensor([[5.0, -0.0, 0.0]]).to(dtype), mask) == ([], minus)


def test_trap_10_ties_that_have_come_apart(tmp_path):
    table = torch.randn(6, 4)
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    names = ("model.embed_tokens.weight", "lm_head.weight")
    save_file(dict(zip(names, (table, table.clone()), strict=True)), tmp_path / "model.safetensors")
    assert findings(tmp_path) == set()
    save_file(dict(zip(names, (table, table + 1), strict=True)), tmp_path / "model.safetensors")
    ((name, problem),) = findings(tmp_path)
    assert name == "lm_head.weight"
    assert "same tensor as model.embed_tokens.weight" in problem
    (tmp_path / "config.json").write_text("{}")
    assert findings(tmp_path) == set()


def test_masks_of_two_places_that_differ(tmp_path):
    state, masks = pruned()
    write_compressed(state, masks, tmp_path / "m")
    other = dict(masks)
    other["fc1.weight"] = SparseMask(masks["fc1.weight"].mask.roll(1))
    different = int((other["fc1.weight"].mask ^ masks["fc1.weight"].mask).sum())
    write_masks(other, tmp_path / "other.npz")
    what = f"has another mask in the layout than in the mask file, at {different} of 128 positions"
    assert ("fc1.weight", what) in findings(tmp_path / "m", masks=tmp_path / "other.npz")
    write_masks({"fc1.weight": masks["fc1.weight"], "x": masks["fc1.weight"]}, tmp_path / "third.npz")
    assert findings(tmp_path / "other.npz", masks=tmp_path / "third.npz") == {
        ("fc1.weight", f"has another mask here than in the mask file, at {different} of 128 positions"),
        ("fc2.weight", "is only in this file"),
        ("x", "is only in the other mask file"),
    }


# -- damage --------------------------------------------------------------------------------------------


def test_input_every_damaged_tensor_is_named_and_the_rest_is_checked(tmp_path):
    state, masks = pruned()
    write_compressed(state, masks, tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    tensors["fc1.compressed"][0] += 1
    tensors["fc1.bias"][0] = float("nan")
    save_file(tensors, path, metadata=header)
    found = dict(findings(tmp_path))
    assert set(found) == {"fc1.weight", "fc1.bias"}
    assert "tensor 'fc1.compressed' does not match its checksum" in found["fc1.weight"]
    assert "tensor 'fc1.bias' does not match its checksum" in found["fc1.bias"]


@pytest.mark.parametrize("file", ["model.safetensors", "masks.safetensors", "config.json", "pruning.json"])
def test_input_a_damaged_file_is_a_finding(file, model):
    data = (model / file).read_bytes()
    (model / file).write_bytes(data[: len(data) // 2])
    found = validate(model)
    assert not found["ok"]
    assert any(file in each["name"] + each["problem"] for each in found["violations"])


def test_input_a_damaged_checkpoint_or_mask_file_is_a_finding(tmp_path):
    state, masks = pruned()
    save_checkpoint(state, tmp_path / "c.safetensors", masks=masks)
    for ending in ("pt", "npz", "safetensors"):
        write_masks(masks, tmp_path / f"m.{ending}")
    for path in tmp_path.iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data[:-1])
        ((_, problem),) = findings(path)
        assert path.name in problem


def test_input_what_cannot_be_checked_is_an_error(model, tmp_path):
    for path, options, error, said in (
        (tmp_path / "no", {}, FileNotFoundError, "no file or folder"),
        (model / "config.json", {}, ValueError, r"ending that is not known; known: \.pt, \.npz, \.safetensors, or"),
        (model, {"masks": tmp_path / "no.npz"}, FileNotFoundError, "no file"),
        (model, {"masks": model / "config.json"}, ValueError, "not a mask format"),
        (model, {"sparsity": 1.0}, ValueError, "sparsity"),
        (model, {"sparsity": float("nan")}, ValueError, "sparsity"),
        (model, {"pattern": "4:2"}, ValueError, "N:M keeps N of M"),
        (model, {"pattern": "wedge"}, ValueError, "wedge"),
    ):
        with pytest.raises(error, match=said):
            validate(path, **options)
    (tmp_path / "bins").mkdir()
    torch.save({"w": torch.ones(1)}, tmp_path / "bins" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is a pickle"):
        validate(tmp_path / "bins")


def test_a_sparsity_without_masks_or_one_the_pattern_cannot_have(model):
    (model / "masks.safetensors").unlink()
    (model / "pruning.json").unlink()
    assert findings(model) == set()
    ((_, problem),) = findings(model, sparsity=0.5)
    assert "no masks to compare" in problem
    assert any("has sparsity 0.5 and no other" in problem for _, problem in findings_of_counts())


def findings_of_counts():
    return {("all", problem) for problem in check_counts(pruned()[1], 0.7, NM(2, 4))}
