"""Masks checked, counted, applied, saved and loaded."""

import errno
import json
import os
import pickle
import resource
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from resu.core import io, mask_files
from resu.core.mask import SparseMask
from resu.modules.linear import RESULinear
from resu.pruning.mask_ops import (
    apply_masks_to_model,
    compute_sparsity_stats,
    load_mask,
    save_mask,
    validate_mask,
)

FORMATS = ("pt", "npz", "safetensors")


def some_masks(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a/b.weight": (5, 11), "conv.weight": (4, 3, 3, 3), "ü": (7,), "scalar": ()}
    return {name: torch.rand(shape, generator=generator) < 0.4 for name, shape in shapes.items()}


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


# -- validation and statistics -------------------------------------------------------------------------


def test_a_mask_of_the_right_sparsity_is_valid_to_within_one_weight():
    mask = torch.arange(100) >= 29
    assert validate_mask(mask, 0.29) == (
        True,
        {"sparsity": 0.29, "n_active": 71, "n_pruned": 29, "shape": (100,), "error": 0.0, "problem": None},
    )
    assert validate_mask(mask, 0.295)[0]
    ok, stats = validate_mask(mask, 0.30)
    assert not ok
    assert stats["error"] == pytest.approx(0.01)
    assert stats["problem"] == "sparsity is 0.29, expected 0.3"
    assert validate_mask(mask, 0.35, tolerance=0.1)[0]
    assert validate_mask(SparseMask(mask))[1]["sparsity"] == 0.29


@pytest.mark.parametrize(
    ("mask", "problem"),
    [
        (torch.ones(3), "dtype is torch.float32"),
        (torch.zeros(3, dtype=torch.bool), "keeps nothing"),
        (torch.zeros(0, dtype=torch.bool), "empty"),
    ],
)
def test_what_is_no_mask_is_said(mask, problem):
    ok, stats = validate_mask(mask)
    assert not ok
    assert problem in stats["problem"]
    with pytest.raises(TypeError, match="bool tensor"):
        validate_mask([True])


def test_statistics_are_sums_and_means():
    masks = {"a": torch.tensor([True, False, False, False]), "b": SparseMask(torch.ones(2, 6, dtype=torch.bool))}
    stats = compute_sparsity_stats(masks)
    assert stats["global"] == {
        "sparsity": 3 / 16,
        "mean_layer_sparsity": 0.375,
        "std_layer_sparsity": 0.375,
        "n_active": 13,
        "n_pruned": 3,
        "numel": 16,
        "n_layers": 2,
    }
    assert stats["per_layer"]["b"] == {"sparsity": 0.0, "n_active": 12, "n_pruned": 0, "numel": 12, "shape": (2, 6)}
    assert compute_sparsity_stats({})["global"]["sparsity"] == 0.0
    with pytest.raises(TypeError, match="mask 'w': SparseMask needs a bool tensor"):
        compute_sparsity_stats({"w": torch.ones(2)})
    with pytest.raises(TypeError, match="must be a mapping"):
        compute_sparsity_stats([torch.ones(2, dtype=torch.bool)])


# -- applying ------------------------------------------------------------------------------------------


def test_trap_08_applied_masks_leave_positive_zeros_and_kept_values():
    model = nn.Sequential(nn.Linear(4, 3))
    before = model[0].weight.detach().clone()
    mask = torch.rand(3, 4) < 0.5
    assert apply_masks_to_model(model, {"0.weight": mask}) is model
    weight = model[0].weight.detach()
    assert torch.equal(weight[mask], before[mask])
    assert not weight[~mask].any()
    assert not torch.signbit(weight[~mask]).any()
    assert model[0].weight.requires_grad


def test_a_resurrection_layer_holds_the_mask_it_is_given():
    model = nn.Sequential(RESULinear(4, 3))
    mask = torch.rand(3, 4) < 0.5
    apply_masks_to_model(model, {"0.weight": mask})
    assert model[0].mask == SparseMask(mask)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    assert not model[0].weight.detach()[~mask].any()


def test_masks_that_do_not_fit_change_nothing():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    good = torch.zeros(3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"no parameter '2.weight'; it has: 0.weight"):
        apply_masks_to_model(model, {"0.weight": good, "2.weight": good})
    with pytest.raises(ValueError, match=r"mask '1.weight' has shape \(3, 4\), the parameter \(2, 3\)"):
        apply_masks_to_model(model, {"0.weight": good, "1.weight": good})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# -- files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_masks_and_metadata_come_back(format, tmp_path):
    masks, about = some_masks(), {"who": "ü", "figures": [1, 2.5, None], "deep": {"a": True}}
    path = tmp_path / f"m.{format}"
    save_mask(masks, path, metadata=about)
    loaded, metadata = load_mask(path)
    assert same(loaded, masks)
    assert metadata == about
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    other = tmp_path / "noending"
    save_mask({k: SparseMask(m) for k, m in masks.items()}, str(other), format=format)
    assert same(load_mask(other, format)[0], masks)
    assert load_mask(other, format)[1] == {}


@given(seed=st.integers(0, 99), format=st.sampled_from(FORMATS))
def test_any_masks_come_back(seed, format, tmp_path_factory):
    path = tmp_path_factory.mktemp("m") / f"m.{format}"
    masks = some_masks(seed)
    save_mask(masks, path)
    assert same(load_mask(path)[0], masks)


def test_the_layout_is_numpys_packed_bits(tmp_path):
    masks = some_masks()
    save_mask(masks, tmp_path / "m.safetensors")
    from safetensors.numpy import load_file

    raw = load_file(tmp_path / "m.safetensors")
    bits = np.packbits(masks["a/b.weight"].numpy(), axis=-1, bitorder="little")
    assert np.array_equal(raw["a/b.weight"], bits)
    assert raw["a/b.weight"].dtype == np.uint8


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_is_there_is_not_replaced_unasked(format, tmp_path):
    path = tmp_path / f"m.{format}"
    save_mask(some_masks(0), path)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_mask(some_masks(1), path)
    assert same(load_mask(path)[0], some_masks(0))
    save_mask(some_masks(1), path, overwrite=True)
    assert same(load_mask(path)[0], some_masks(1))


@pytest.mark.parametrize("format", FORMATS)
def test_input_every_flipped_byte_is_noticed_or_harmless(format, tmp_path):
    path, bad = tmp_path / f"m.{format}", tmp_path / f"bad.{format}"
    masks = {"w": torch.rand(3, 9) < 0.5}
    save_mask(masks, path, metadata={"k": "v"})
    good = path.read_bytes()
    noticed = 0
    for i in range(0, len(good), 1 if len(good) < 800 else 3):
        bad.write_bytes(good[:i] + bytes([good[i] ^ (1 << i % 8)]) + good[i + 1 :])
        try:
            loaded, metadata = load_mask(bad)
        except ValueError:
            noticed += 1
        else:  # a byte that carries nothing, such as a time in an archive
            assert same(loaded, masks)
            assert metadata == {"k": "v"}
    assert noticed > 50


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_input_truncated_files_are_an_error(format, share, tmp_path):
    path = tmp_path / f"m.{format}"
    save_mask(some_masks(), path)
    good = path.read_bytes()
    path.write_bytes(good[: int(share * len(good))])
    with pytest.raises(ValueError, match=rf"cannot read .*m.{format} as masks"):
        load_mask(path)


@pytest.mark.parametrize("format", FORMATS)
def test_input_no_truncation_goes_unnoticed(format, tmp_path):
    path = tmp_path / f"m.{format}"
    save_mask(some_masks(), path, metadata={"k": "v"})
    good = path.read_bytes()
    for length in {*range(0, len(good), 73), 1, 7, 8, 9, len(good) - 1}:
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match=rf"m\.{format}"):
            load_mask(path)


@pytest.mark.parametrize("format", FORMATS)
def test_input_missing_and_foreign_files_are_an_error(format, tmp_path):
    path = tmp_path / f"m.{format}"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_mask(path)
    path.write_bytes(os.urandom(500))
    with pytest.raises(ValueError, match="cannot read"):
        load_mask(path)
    if format == "npz":
        np.savez(path, a=np.ones(3))
    elif format == "pt":
        torch.save({"a": torch.ones(3)}, path)
    else:
        from safetensors.torch import save_file

        save_file({"a": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"not (a mask file )?written by resu"):
        load_mask(path)


@pytest.mark.parametrize("format", FORMATS)
def test_input_a_pickle_with_code_is_refused_and_not_run(format, tmp_path):
    path, trace = tmp_path / f"m.{format}", tmp_path / "trace"

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(trace),)

    if format == "npz":
        np.savez(path, header=np.array([Code()], dtype=object))
    elif format == "pt":
        torch.save({"resu_masks": Code()}, path)
    else:
        path.write_bytes(pickle.dumps(Code()))
    with pytest.raises(ValueError, match="cannot read"):
        load_mask(path)
    assert not trace.exists()


def test_a_difference_names_the_mask(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = tmp_path / "m.safetensors"
    save_mask(some_masks(), path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    for name, change in (
        ("conv.weight", lambda t: t ^ 1),
        ("conv.weight", lambda t: t[:3].contiguous()),
        ("conv.weight", lambda t: t.to(torch.int16)),
        ("a/b.weight", lambda t: t | 128),
    ):
        save_file({**tensors, name: change(tensors[name])}, path, metadata=header)
        with pytest.raises(ValueError, match=f"mask '{name}'"):
            load_mask(path)
    save_file({k: v for k, v in tensors.items() if k != "ü"}, path, metadata=header)
    with pytest.raises(ValueError, match="disagree about 'ü'"):
        load_mask(path)


def test_a_newer_version_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(mask_files, "_VERSION", 99)
    save_mask(some_masks(), tmp_path / "m.npz")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="format version 99, this version of resu reads up to 1"):
        load_mask(tmp_path / "m.npz")


@pytest.mark.parametrize("format", FORMATS)
def test_input_a_full_disk_leaves_the_old_file_whole(format, tmp_path, monkeypatch):
    path = tmp_path / f"m.{format}"
    save_mask(some_masks(0), path)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(io.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_mask(some_masks(1), path, overwrite=True)
    monkeypatch.undo()
    assert same(load_mask(path)[0], some_masks(0))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
@pytest.mark.parametrize("format", FORMATS)
def test_input_a_write_that_stops_in_the_middle_leaves_nothing(format, tmp_path):
    path = tmp_path / f"m.{format}"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises((OSError, RuntimeError)):
            save_mask({"w": torch.rand(500, 500) < 0.5}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_input_bad_arguments_write_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"the ending of .*m.pkl' is not a mask format; known: pt, npz, safetensors"):
        save_mask(some_masks(), tmp_path / "m.pkl")
    with pytest.raises(ValueError, match="format 'h5'"):
        save_mask(some_masks(), tmp_path / "m.pt", format="h5")
    with pytest.raises(TypeError, match="mask 'w'"):
        save_mask({"w": torch.ones(3)}, tmp_path / "m.pt")
    for wrong in ({"f": float("nan")}, {"t": torch.ones(1)}):
        with pytest.raises(TypeError, match="metadata must be plain JSON"):
            save_mask(some_masks(), tmp_path / "m.pt", metadata=wrong)
    with pytest.raises(FileNotFoundError, match="does not exist; make it first"):
        save_mask(some_masks(), tmp_path / "no" / "m.pt")
    with pytest.raises((IsADirectoryError, FileExistsError)):
        save_mask(some_masks(), tmp_path, format="pt", overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_links_are_followed_and_modes_kept(tmp_path):
    path, link = tmp_path / "m.npz", tmp_path / "link.npz"
    save_mask(some_masks(0), path)
    path.chmod(0o640)
    link.symlink_to(path)
    save_mask(some_masks(1), link, overwrite=True)
    assert link.is_symlink()
    assert same(load_mask(path)[0], some_masks(1))
    assert path.stat().st_mode & 0o777 == 0o640


def test_the_header_is_readable_by_anyone(tmp_path):
    from safetensors import safe_open

    save_mask(some_masks(), tmp_path / "m.safetensors", metadata={"a": 1})
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        body = json.loads(file.metadata()["resu_masks"])
    assert body["version"] == 1
    assert body["metadata"] == {"a": 1}
    entry = body["masks"]["conv.weight"]
    assert entry["shape"] == [4, 3, 3, 3]
    assert entry["kept"] == int(some_masks()["conv.weight"].sum())
    assert len(entry["sha256"]) == 64
    assert body["library"]
