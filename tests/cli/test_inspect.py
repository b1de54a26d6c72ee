"""`resu inspect` on every kind of file, whole and damaged."""

import json
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("typer")
from safetensors.torch import save_file

from resu import RESULinear, SparseMask, save_checkpoint
from resu.cli.inspect import histogram
from resu.pruning.mask_ops import save_mask


def document(resu, path):
    result = resu("inspect", path, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


@pytest.fixture
def masks(model):
    weights = {name: weight for name, weight in model.named_parameters() if weight.ndim == 2}
    found = {name: SparseMask.from_magnitude(weight, 0.75) for name, weight in weights.items()}
    for name, mask in found.items():
        mask.apply_(weights[name].data)
    return found


@pytest.mark.parametrize("layout", ["dense", "bitmask"])
def test_a_checkpoint(resu, tmp_path, model, masks, layout):
    path = tmp_path / "model.safetensors"
    save_checkpoint(model, path, masks=masks, layout=layout, metadata={"epoch": 3})
    found = document(resu, path)
    assert found["kind"] == "checkpoint"
    assert found["bytes"] == path.stat().st_size
    assert found["total"]["kept"] == 160
    assert found["total"]["sparsity"] == 0.75
    rows = {row["name"]: row for row in found["tensors"] if row["kind"] != "mask"}
    assert rows["0.weight"]["shape"] == [32, 16]
    assert rows["0.weight"]["kept"] == 128

    result = resu("inspect", path)
    assert result.exit_code == 0
    for text in ("0.weight", "32×16", "75.00 %", "70– 80 %", "epoch: 3", "Sparsity of 2 weights"):
        assert text in result.stdout


@pytest.mark.parametrize("ending", ["safetensors", "npz", "pt"])
def test_a_mask_file(resu, tmp_path, masks, ending):
    path = tmp_path / f"masks.{ending}"
    save_mask(masks, path, metadata={"by": "magnitude"})
    found = document(resu, path)
    assert found["kind"] == "masks"
    assert [row["kept"] for row in found["tensors"]] == [128, 32]
    assert "by: magnitude" in resu("inspect", path).stdout


def test_a_layer_in_a_quantized_mode(resu, tmp_path):
    layer = RESULinear(64, 32)
    layer.prune_by_magnitude(0.5)
    layer.enter_qresu_mode(bits=4)
    path = tmp_path / "layer.safetensors"
    save_checkpoint(layer, path)
    kinds = {row["kind"] for row in document(resu, path)["tensors"]}
    assert {"codes", "theta", "scale"} <= kinds
    assert "theta" in resu("inspect", path).stdout


def test_a_file_without_masks_counts_values_and_says_so(resu, tmp_path):
    path = tmp_path / "plain.safetensors"
    save_file({"w": torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "b": torch.ones(2)}, path)
    assert document(resu, path)["total"]["sparsity"] == 0.75
    assert "not zero" in resu("inspect", path).stdout


def test_an_empty_tensor_has_no_sparsity(resu, tmp_path):
    path = tmp_path / "empty.safetensors"
    save_file({"none": torch.ones(0, 4), "w": torch.tensor([[1.0, 0.0]])}, path)
    rows = {row["name"]: row for row in document(resu, path)["tensors"]}
    assert (rows["none"]["kept"], rows["none"]["sparsity"]) == (0, None)
    said = resu("inspect", path).stdout
    assert "0×4" in said
    assert "Sparsity of 1 weights" in said
    save_file({"none": torch.ones(0, 4)}, path)
    assert "Sparsity of" not in resu("inspect", path).stdout


@pytest.mark.parametrize("protocol", [2, 4, None])
def test_a_pickle_with_code_is_refused_in_one_plain_line(refused, tmp_path, protocol):
    path = tmp_path / "model.pt"
    if protocol is None:
        torch.save(nn.Linear(2, 2), path)
    else:
        path.write_bytes(pickle.dumps(nn.Linear, protocol))
    line = refused("inspect", path)
    assert "holds a pickle with code; refused" in line
    assert "weights_only" not in line


@pytest.mark.parametrize("ending", ["pt", "npz"])
def test_an_empty_file_has_its_reason(refused, tmp_path, ending):
    path = tmp_path / f"masks.{ending}"
    path.write_bytes(b"")
    assert refused("inspect", path).endswith("the file is empty")


def test_a_folder_of_shards(resu, tmp_path):
    for index in (1, 2):
        weight = torch.ones(8, 4 * index)
        save_file({f"w{index}": weight}, tmp_path / f"model-0000{index}-of-00002.safetensors")
    found = document(resu, tmp_path)
    assert [row["name"] for row in found["tensors"]] == ["w1", "w2"]
    assert found["total"]["numel"] == 96


def test_markup_in_names_is_text(resu, tmp_path):
    path = tmp_path / "odd.safetensors"
    save_file({"[bold]w[/bold]": torch.ones(2, 2)}, path)
    assert "[bold]w[/bold]" in resu("inspect", path).stdout


def test_damaged_files_are_refused(refused, tmp_path, model, masks):
    path = tmp_path / "model.safetensors"
    save_checkpoint(model, path, masks=masks)
    whole = path.read_bytes()
    for name, content in {
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "short": whole[:-1],
        "text": b"hello",
        "flipped": whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:],
    }.items():
        path.write_bytes(content)
        assert str(path) in refused("inspect", path), name


@pytest.mark.parametrize("ending", ["safetensors", "npz", "pt"])
def test_truncated_masks_are_refused(refused, tmp_path, masks, ending):
    path = tmp_path / f"masks.{ending}"
    save_mask(masks, path)
    path.write_bytes(path.read_bytes()[:-40])
    refused("inspect", path)


def test_what_is_no_file_is_refused(refused, tmp_path):
    assert "absent" in refused("inspect", tmp_path / "absent.safetensors")
    assert "no safetensors" in refused("inspect", tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert "ending" in refused("inspect", tmp_path / "notes.txt")


def test_a_histogram_of_nothing_is_empty():
    assert histogram([]) == []
    assert histogram([0.0]) == ["   0– 10 %  " + 40 * "█" + " 1"]
    assert histogram([0.999]) == ["  90–100 %  " + 40 * "█" + " 1"]
