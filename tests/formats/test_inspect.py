"""What is said of a file is what is in it."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from resu import save_checkpoint
from resu.core.mask import SparseMask
from resu.formats import files
from resu.formats.compressed import write_compressed
from resu.formats.inspect import describe
from resu.modules.linear import RESULinear
from resu.pruning.mask_ops import save_mask


@pytest.fixture
def pruned():
    model = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 4))
    mask = SparseMask.from_magnitude(model[0].weight, 0.75)
    mask.apply_(model[0].weight)
    return model, {"0.weight": mask}


@pytest.mark.parametrize("ending", ["pt", "npz", "safetensors"])
def test_masks(ending, pruned, tmp_path):
    path = tmp_path / f"m.{ending}"
    save_mask(pruned[1], path, metadata={"by": "hand"})
    found = describe(path)
    json.dumps(found)
    assert found["kind"] == "masks"
    assert found["metadata"] == {"by": "hand"}
    assert found["library"]
    assert found["bytes"] == path.stat().st_size
    (row,) = found["tensors"]
    assert (row["name"], row["shape"], row["kept"], row["sparsity"]) == ("0.weight", [10, 20], 50, 0.75)
    assert row["bytes"] == 10 * 3
    assert row["masked"]
    assert found["total"]["sparsity"] == 0.75


@pytest.mark.parametrize("layout", ["dense", "bitmask"])
def test_checkpoints(layout, pruned, tmp_path):
    path = tmp_path / "m.safetensors"
    model, masks = pruned
    save_checkpoint(model, path, masks=masks, metadata={"epoch": 1}, extra={"o": {"t": torch.ones(3)}}, layout=layout)
    found = describe(path)
    json.dumps(found)
    assert found["kind"] == "checkpoint"
    assert found["metadata"] == {"epoch": 1}
    kinds = {(row["name"], row["kind"]) for row in found["tensors"]}
    weight = ("0.weight", "weight" if layout == "dense" else "bitmask")
    assert kinds == {
        weight,
        ("0.bias", "tensor"),
        ("2.weight", "weight"),
        ("2.bias", "tensor"),
        ("0.weight", "mask"),
        ("resu.extra.o.t", "extra"),
    }
    rows = {(row["name"], row["kind"]): row for row in found["tensors"]}
    assert rows[weight]["kept"] == 50
    assert rows[weight]["sparsity"] == 0.75
    assert rows[weight]["masked"]
    assert not rows["2.weight", "weight"]["masked"]
    assert rows["0.bias", "tensor"]["kept"] is None
    assert found["total"] == {
        "numel": 200,
        "kept": 50,
        "sparsity": 0.75,
        "bytes": sum(r["bytes"] for r in found["tensors"]),
    }


def test_a_checkpoint_is_read_once(pruned, tmp_path, monkeypatch):
    save_checkpoint(pruned[0], tmp_path / "m.safetensors", masks=pruned[1])
    opened = []

    def counted(path, **options):
        opened.append(path)
        return safe_open(path, **options)

    monkeypatch.setattr(files, "safe_open", counted)
    assert describe(tmp_path / "m.safetensors")["kind"] == "checkpoint"
    assert len(opened) == 1


@pytest.mark.parametrize("mode", ["SPARSE", "RESU", "QRESU"])
def test_resurrection_layers(mode, tmp_path):
    layer = RESULinear(20, 10)
    layer.prune_by_magnitude(0.7)
    if mode == "RESU":
        layer.enter_resu_mode()
    elif mode == "QRESU":
        layer.enter_qresu_mode()
    save_checkpoint(nn.Sequential(layer), tmp_path / "m.safetensors")
    found = describe(tmp_path / "m.safetensors")
    assert found["total"]["numel"] == 200
    assert found["total"]["kept"] == 60
    kinds = {row["kind"] for row in found["tensors"]}
    assert {"bitmask", "resu_settings"} <= kinds
    assert ("codes" in kinds) == ("weight" not in kinds) == (mode == "QRESU")


def test_files_of_others_and_folders_of_shards(pruned, tmp_path):
    state = pruned[0].state_dict()
    names = list(state)
    save_file({n: state[n] for n in names[:2]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({n: state[n] for n in names[2:]}, tmp_path / "model-00002-of-00002.safetensors")
    one = describe(tmp_path / "model-00001-of-00002.safetensors")
    assert one["kind"] == "safetensors"
    assert one["library"] is None
    assert one["total"]["kept"] == 50  # counted from values, for want of a mask
    both = describe(tmp_path)
    assert {row["name"] for row in both["tensors"]} == set(state)
    assert both["total"]["numel"] == 240


def test_input_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        describe(tmp_path / "m.npz")
    with pytest.raises(ValueError, match="holds no safetensors file"):
        describe(tmp_path)
    (tmp_path / "m.txt").write_text("text")
    with pytest.raises(ValueError, match="an ending that is not known; known: pt, npz, safetensors"):
        describe(tmp_path / "m.txt")
    for ending in ("pt", "npz", "safetensors"):
        (tmp_path / f"m.{ending}").write_text("text")
        with pytest.raises(ValueError, match=r"cannot read|no safetensors file"):
            describe(tmp_path / f"m.{ending}")


# -- model folders -------------------------------------------------------------------------------------


def test_masks_beside_the_weights_say_what_is_kept(pruned, tmp_path):
    model, masks = pruned
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    state["0.weight"].view(-1)[masks["0.weight"].active_indices[:3]] = 0  # kept zeros
    names = list(state)
    save_file({n: state[n] for n in names[:1]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({n: state[n] for n in names[1:]}, tmp_path / "model-00002-of-00002.safetensors")
    assert describe(tmp_path)["total"]["kept"] == 47 + 40
    save_mask({**masks, "gone": torch.ones(3, dtype=torch.bool)}, tmp_path / "masks.safetensors", metadata={"by": "x"})
    found = describe(tmp_path)
    json.dumps(found)
    rows = {row["name"]: row for row in found["tensors"]}
    assert (rows["0.weight"]["kept"], rows["0.weight"]["masked"]) == (50, True)
    assert (rows["2.weight"]["kept"], rows["2.weight"]["masked"]) == (40, False)
    assert rows["gone"]["kind"] == "mask"
    assert found["kind"] == "model"
    assert found["metadata"] == {"by": "x"}
    assert found["total"]["kept"] == 53
    assert found["bytes"] == sum(path.stat().st_size for path in tmp_path.glob("model-*"))


@pytest.mark.parametrize("layout", ["sparse-bitmask", "sparse-24-bitmask"])
def test_sparse_layouts_are_seen_as_their_weights(layout, tmp_path):
    weight = torch.randn(4, 8, dtype=torch.bfloat16)
    mask = SparseMask(torch.tensor([[True, False, True, False] * 2] * 4))
    mask.apply_(weight)
    write_compressed({"fc.weight": weight, "fc.bias": torch.ones(4)}, {"fc.weight": mask}, tmp_path, layout=layout)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = describe(path)
        rows = {row["name"]: row for row in found["tensors"]}
        assert set(rows) == {"fc.weight", "fc.bias"}
        row = rows["fc.weight"]
        assert (row["shape"], row["dtype"], row["kept"], row["masked"]) == ([4, 8], "bfloat16", 16, True)
        assert (row["kind"], row["layout"]) == ("bitmask", layout)
        assert row["bytes"] == 16 * 2 + 4 + 2 * 8 + (4 * 8 if layout == "sparse-bitmask" else 0)


def test_a_folder_with_a_checkpoint_or_with_masks_alone(pruned, tmp_path):
    model, masks = pruned
    save_mask(masks, tmp_path / "masks.safetensors")
    assert describe(tmp_path)["kind"] == "masks"
    save_checkpoint(model, tmp_path / "model.safetensors", masks=masks, metadata={"epoch": 1})
    found = describe(tmp_path)
    assert (found["kind"], found["metadata"], found["path"]) == ("checkpoint", {"epoch": 1}, str(tmp_path))


def test_input_a_mask_beside_that_does_not_fit_is_an_error(pruned, tmp_path):
    save_file({"0.weight": torch.ones(3, 3)}, tmp_path / "model.safetensors")
    save_mask(pruned[1], tmp_path / "masks.safetensors")
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(3, 3\), its mask"):
        describe(tmp_path)
