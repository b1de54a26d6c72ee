"""`resu validate`: exit code, findings and what is said of them."""

import json

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("typer")

from resu import SparseMask
from resu.core.mask_files import write_masks


@pytest.fixture
def model(tmp_path):
    weight = torch.randn(8, 16)
    mask = SparseMask.from_magnitude(weight, 0.5)
    mask.apply_(weight)
    save_file({"fc.weight": weight, "[b]x[/b]": torch.ones(3)}, tmp_path / "model.safetensors")
    write_masks({"fc.weight": mask}, tmp_path / "masks.safetensors")
    return tmp_path


def test_a_whole_model(resu, model):
    result = resu("validate", model, "--sparsity", "0.5")
    assert result.exit_code == 0
    assert result.stderr == ""
    for text in ("fc.weight", "8×16", "50.00 %", "[b]x[/b]", ": ok; 2 tensors, 1 masks"):
        assert text in result.stdout
    found = json.loads(resu("validate", model, "--json").stdout)
    assert found["ok"]
    assert found["total"]["kept"] == 64


def test_findings_have_names_and_exit_code_1(resu, model):
    result = resu("validate", model, "--pattern", "2:4", "--sparsity", "0.5")
    assert result.exit_code == 1
    assert "wrong: fc.weight: breaks 2:4 in" in result.stdout
    save_file({"fc.weight": torch.ones(8, 16)}, model / "model.safetensors")
    result = resu("validate", model, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["violations"] == [
        {"name": "fc.weight", "problem": "is not zero at 64 of 64 positions its mask prunes"}
    ]


def test_minus_zeros_are_told(resu, model):
    from safetensors.torch import load_file

    weight = load_file(model / "model.safetensors")["fc.weight"]
    save_file({"fc.weight": torch.where(weight == 0, -0.0, weight)}, model / "model.safetensors")
    result = resu("validate", model)
    assert result.exit_code == 0
    assert "note: fc.weight: 64 pruned positions hold -0.0" in result.stdout


def test_another_mask_file_can_be_named(resu, model, tmp_path):
    write_masks({"fc.weight": SparseMask(torch.ones(8, 16, dtype=torch.bool))}, tmp_path / "all.npz")
    result = resu("validate", model / "model.safetensors", "--masks", tmp_path / "all.npz", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["total"]["sparsity"] == 0


def test_a_truncated_file_is_a_finding(resu, model):
    data = (model / "masks.safetensors").read_bytes()
    (model / "masks.safetensors").write_bytes(data[:-3])
    result = resu("validate", model)
    assert result.exit_code == 1
    assert "wrong: masks.safetensors: cannot read" in result.stdout
    assert resu("validate", model / "masks.safetensors").exit_code == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--sparsity", "1.0"), "sparsity"),
        (("--sparsity", "nan"), "sparsity"),
        (("--sparsity", "half"), "must be a number"),
        (("--sparsity", "-0.1"), "sparsity"),
        (("--pattern", "4:2"), "N:M"),
        (("--pattern", "wedge"), "wedge"),
        (("--masks", "no.npz"), "no.npz"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(refused, model, args, said):
    assert said in refused("validate", model, *args)


def test_what_is_not_there_or_no_model_is_refused(refused, tmp_path):
    assert "no file or folder" in refused("validate", tmp_path / "absent")
    assert "no safetensors file" in refused("validate", tmp_path)
    torch.save({"w": torch.ones(1)}, tmp_path / "model.bin")
    assert "pickle" in refused("validate", tmp_path)
    refused("validate")
