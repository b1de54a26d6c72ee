"""Files written tensor after tensor are safetensors files like any other, with checksums."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from resu.core.io import tensor_checksum
from resu.formats.sealed import SealedWriter
from resu.formats.stored import Stored

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.int8]
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def write(path, tensors, **options):
    path.touch()
    writer = SealedWriter(path, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, **options)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()


@given(kinds=st.lists(st.tuples(shapes, st.sampled_from([*DTYPES, torch.bool])), max_size=6))
def test_the_safetensors_library_reads_what_was_written(kinds, tmp_path_factory):
    path = tmp_path_factory.mktemp("s") / "m.safetensors"
    tensors = {f"ü{i}": torch.randint(0, 2, shape).to(dtype) for i, (shape, dtype) in enumerate(kinds)}
    write(path, tensors, metadata={"by": "hand"})
    back = load_file(path)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert tensor_checksum(back[name]) == tensor_checksum(tensor)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert (metadata["by"], metadata["format"]) == ("hand", "pt")
    assert json.loads(metadata["resu_shard"])["sha256"] == {n: tensor_checksum(t) for n, t in tensors.items()}
    assert Stored.open(path).sums == {n: tensor_checksum(t) for n, t in tensors.items()}


def test_wide_numbers_begin_at_multiples_of_their_size(tmp_path):
    path = tmp_path / "m.safetensors"
    write(path, {"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(1), "c": torch.ones(1, dtype=torch.float64)})
    entries = Stored.open(path).shards.entries
    assert all(entry.start % size == 0 for entry, size in ((entries["b"], 4), (entries["c"], 8)))


def test_what_was_not_announced_or_has_not_come_is_said(tmp_path):
    path = tmp_path / "m.safetensors"
    path.touch()
    writer = SealedWriter(path, {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))})
    for wrong in (torch.ones(3), torch.ones(2, dtype=torch.float16)):
        with pytest.raises(ValueError, match=r"torch.float32 \(2,\) was announced for it"):
            writer.add("a", wrong)
    writer.add("a", torch.ones(2))
    with pytest.raises(ValueError, match="'b' was announced and has not been written"):
        writer.close()
    with pytest.raises(ValueError, match="which safetensors files do not have"):
        SealedWriter(path, {"a": (torch.complex128, (2,))})
