"""`resu convert`: there and back, and refusals in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("typer")

from resu import SparseMask
from resu.core.mask_files import write_masks
from resu.core.pattern import NM


@pytest.fixture
def model(tmp_path):
    weight = torch.randn(8, 16, dtype=torch.bfloat16)
    mask = SparseMask(NM(2, 4).mask(weight.abs(), 0.5))
    mask.apply_(weight)
    (tmp_path / "model").mkdir()
    save_file({"fc.weight": weight, "fc.bias": torch.ones(8)}, tmp_path / "model/model.safetensors")
    write_masks({"fc.weight": mask}, tmp_path / "model/masks.safetensors")
    return tmp_path / "model"


@pytest.mark.parametrize(("layout", "name"), [("bitmask", "sparse-bitmask"), ("sparse-24", "sparse-24-bitmask")])
def test_there_and_back(resu, model, tmp_path, layout, name):
    result = resu("convert", model, "--to", layout, "--out", tmp_path / "small")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert name in result.stdout
    assert "1 packed; sparsity 50.00 %" in result.stdout
    result = resu("convert", tmp_path / "small", "--to", "dense", "--out", tmp_path / "back", "--json")
    report = json.loads(result.stdout)
    assert report["total"] == {"numel": 128, "kept": 64, "sparsity": 0.5}
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "back"))
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert resu("validate", tmp_path / "small", "--pattern", "2:4").exit_code == 0


def test_nothing_is_replaced_unasked(resu, refused, model, tmp_path):
    call = ("convert", model, "--to", "bitmask", "--out", tmp_path / "small")
    assert resu(*call).exit_code == 0
    assert "pass --force to replace" in refused(*call)
    assert resu(*call, "--force").exit_code == 0
    assert "must not be the source" in refused("convert", model, "--to", "bitmask", "--out", model, "--force")


def test_refusals(refused, model, tmp_path):
    out = ("--out", tmp_path / "out")
    assert "known: dense, bitmask, sparse-24" in refused("convert", model, "--to", "csr", *out)
    assert "no file or folder" in refused("convert", tmp_path / "absent", "--to", "dense", *out)
    assert "absent.npz" in refused("convert", model, "--to", "bitmask", *out, "--masks", tmp_path / "absent.npz")
    (model / "masks.safetensors").unlink()
    assert "no masks" in refused("convert", model, "--to", "bitmask", *out)
    torch.save({"w": torch.ones(1)}, tmp_path / "model.pt")
    refused("convert", tmp_path / "model.pt", "--to", "dense", "--out", tmp_path / "o.safetensors")
    refused("convert", model, "--to", "dense")
    refused("convert", model, *out)
    assert not (tmp_path / "out").exists()
