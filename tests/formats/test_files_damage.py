"""Checkpoints that are damaged, truncated, something else, or met a full disk: a clear error, and nothing changed."""

import copy
import errno

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from resu import load_checkpoint, save_checkpoint
from resu.core import io
from resu.core.mask import SparseMask
from tests.formats.helpers import network, pruned, same_state


def test_input_a_full_disk_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    first = network()
    save_checkpoint(first, path)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(io.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(network(), path, overwrite=True)
    monkeypatch.undo()
    assert torch.equal(load_checkpoint(path).state["3.weight"], first[3].weight)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_input_every_flipped_byte_is_noticed(tmp_path):
    path, bad = tmp_path / "m.safetensors", tmp_path / "bad.safetensors"
    model = nn.Linear(3, 2)
    mask = SparseMask.from_magnitude(model.weight, 0.5)
    mask.apply_(model.weight)
    save_checkpoint(model, path, masks={"weight": mask}, extra={"s": {"t": torch.ones(2)}}, metadata={"k": "v"})
    good = path.read_bytes()
    before = load_checkpoint(path)
    for i in range(len(good)):
        bad.write_bytes(good[:i] + bytes([good[i] ^ (1 << i % 8)]) + good[i + 1 :])
        other = nn.Linear(3, 2)
        untouched = copy.deepcopy(other)
        try:
            found = load_checkpoint(bad, other)
        except ValueError:
            assert same_state(other, untouched), f"byte {i}"
        else:  # nothing that is used
            assert found.metadata == before.metadata, f"byte {i}"
            assert found.masks == before.masks, f"byte {i}"
            assert all(torch.equal(found.state[k], before.state[k]) for k in before.state), f"byte {i}"


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.99])
def test_input_truncated_and_missing_files_are_an_error(share, tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_checkpoint(path)
    save_checkpoint(network(), path)
    good = path.read_bytes()
    path.write_bytes(good[: int(share * len(good))])
    with pytest.raises(ValueError, match=r"cannot read .* as safetensors"):
        load_checkpoint(path)


@pytest.mark.parametrize("layout", ["dense", "bitmask"])
def test_input_no_truncation_goes_unnoticed(layout, tmp_path):
    path = tmp_path / "m.safetensors"
    model, masks = pruned()
    save_checkpoint(model, path, masks=masks, layout=layout)
    good = path.read_bytes()
    for length in {*range(0, len(good), 61), 1, 7, 8, 9, len(good) - 1}:
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match=r"m\.safetensors"):
            load_checkpoint(path)


def test_input_a_pickle_is_refused(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"cannot read .* as safetensors"):
        load_checkpoint(tmp_path / "m.safetensors")


def test_input_a_damaged_tensor_is_named(tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(network(), path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    save_file({**tensors, "3.weight": tensors["3.weight"] + 1}, path, metadata=header)
    with pytest.raises(ValueError, match=r"tensor '3.weight' does not match its checksum"):
        load_checkpoint(path)
    save_file({k: v for k, v in tensors.items() if k != "5.bias"}, path, metadata=header)
    with pytest.raises(ValueError, match=r"disagree about '5.bias'"):
        load_checkpoint(path)
