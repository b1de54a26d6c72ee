"""Masks that are written chunk by chunk are the masks that are written at once."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resu.core.io import FileFormatError
from resu.core.mask import SparseMask
from resu.core.mask_files import read_masks, write_masks
from resu.core.mask_stream import BitWriter, aligned, join_masks, packed_bytes


@settings(max_examples=80)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    size=st.integers(1, 50),
    unit=st.integers(1, 10),
    seed=st.integers(0, 9),
)
def test_chunks_give_the_packed_mask_and_its_entry(tmp_path_factory, shape, size, unit, seed):
    path = tmp_path_factory.mktemp("bits") / "bits"
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    whole = SparseMask(mask)
    step = aligned(shape, size, unit)
    assert step % unit == 0
    with open(path, "wb") as file:
        writer = BitWriter(file, 3, shape)
        for start in range(0, mask.numel(), step):
            writer.add(mask.reshape(-1)[start : start + step])
    assert path.read_bytes()[3:] == bytes(whole.packed.reshape(-1).tolist())
    assert packed_bytes(shape) == whole.nbytes
    assert writer.entry() == {"shape": shape, "kept": whole.n_active, "sha256": whole.checksum()}


def test_a_joined_file_reads_like_one_written_at_once(tmp_path):
    masks = {f"m{i}": SparseMask(torch.rand(5, 7 + i) < 0.5) for i in range(4)}
    parts = []
    for i, names in enumerate((["m0", "m1", "m2"], [], ["m3"])):
        (tmp_path / f"{i}").write_bytes(b"".join(bytes(masks[n].packed.reshape(-1).tolist()) for n in names))
        entries = {
            n: {"shape": list(masks[n].shape), "kept": masks[n].n_active, "sha256": masks[n].checksum()} for n in names
        }
        parts.append((tmp_path / f"{i}", entries))
    join_masks(parts, tmp_path / "joined.safetensors", {"by": "me"})
    write_masks(masks, tmp_path / "whole.safetensors", {"by": "me"})
    joined, whole = (read_masks(tmp_path / f"{name}.safetensors") for name in ("joined", "whole"))
    assert joined == whole
    with pytest.raises(FileExistsError, match="overwrite"):
        join_masks(parts, tmp_path / "joined.safetensors")
    with pytest.raises(ValueError, match="safetensors"):
        join_masks(parts, tmp_path / "joined.npz")
    with pytest.raises(TypeError, match="JSON"):
        join_masks(parts, tmp_path / "other.safetensors", {"by": torch.ones(1)})
    data = bytearray((tmp_path / "joined.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "joined.safetensors").write_bytes(data)
    with pytest.raises(FileFormatError, match="m3"):
        read_masks(tmp_path / "joined.safetensors")
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    assert set(json.loads(header)) == {"__metadata__", *masks}
