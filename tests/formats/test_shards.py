"""Shards written tensor after tensor: the bytes safetensors would write, all or nothing."""

import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from resu.core.mask import SparseMask
from resu.core.mask_files import read_masks
from resu.core.mask_stream import join_masks
from resu.core.shards import DTYPES, Shards
from resu.formats import shards as module
from resu.formats.bitmask import pack_compressed
from resu.formats.shards import write_shard
from resu.formats.stored import Stored


class Given:
    """The masker of a mask that is there."""

    def __init__(self, mask, unit=1):
        self.flat, self.unit, self.place = mask.reshape(-1), unit, 0

    def __call__(self, weights):
        self.place += len(weights)
        return self.flat[self.place - len(weights) : self.place]


def written(tmp_path, tensors, masks, **options):
    save_file(tensors, tmp_path / "in.safetensors", metadata={"format": "pt", "by": "me", "resu_shard": "old"})
    maskers = {name: (lambda mask=mask: Given(mask)) for name, mask in masks.items()}
    source = Shards.open(tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    entries = write_shard(source, "in.safetensors", out, maskers, tmp_path / "bits", **options)
    return out, entries


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    kinds = {
        "a.weight": torch.bfloat16,
        "b.weight": torch.float32,
        "c.weight": torch.float64,
        "d.weight": torch.float16,
    }
    found = {n: torch.randn(7, 8 + i, generator=generator).to(d) for i, (n, d) in enumerate(kinds.items())}
    found["e.conv.weight"] = torch.randn(3, 2, 3, 3, generator=generator)
    found["f.bias"] = torch.randn(5, generator=generator).half()
    found["g.codes"] = torch.randint(0, 9, (3, 3), generator=generator).to(torch.uint8)
    found["h.fp8"] = torch.randn(3, 5, generator=generator).to(torch.float8_e4m3fn)
    found["empty"] = torch.zeros(0, 3)
    found["number"] = torch.tensor(5)
    return found


@pytest.fixture
def masks(tensors):
    generator = torch.Generator().manual_seed(1)
    return {n: torch.rand(x.shape, generator=generator) < 0.4 for n, x in tensors.items() if n.endswith("weight")}


@pytest.mark.parametrize("chunk", [1, 24, 1 << 20])
@pytest.mark.parametrize("workers", [1, 4])
def test_trap_08_the_dense_layout_has_positive_zeros_and_is_otherwise_the_source(
    tmp_path, tensors, masks, workers, chunk, monkeypatch
):
    monkeypatch.setattr(module, "CHUNK", chunk)
    out, entries = written(tmp_path, tensors, masks, workers=workers)
    before, after = Shards.open(tmp_path / "in.safetensors"), Shards.open(out)
    assert after.names == before.names
    assert dict(after.metadata["out.safetensors"])["by"] == "me"
    for name, tensor in tensors.items():
        found = after.read(name)
        assert found.dtype == tensor.dtype
        if name in masks:
            assert torch.equal(found, torch.where(masks[name], tensor, torch.zeros((), dtype=tensor.dtype)))
            assert not torch.signbit(found[~masks[name]]).any()
            assert entries[name]["kept"] == int(masks[name].sum())
            assert entries[name]["sha256"] == SparseMask(masks[name]).checksum()
        elif tensor.numel():
            assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    stored = Stored.open(out)
    assert set(stored.sums) == set(tensors)
    for name in tensors:
        stored.read(name)  # verifies the checksum
    assert set(load_file(out)) == set(tensors)  # the library reads it too


@pytest.mark.parametrize("chunk", [1, 24, 1 << 20])
def test_the_bitmask_layout_is_that_of_compressed_tensors(tmp_path, tensors, masks, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    out, _ = written(tmp_path, tensors, masks, layout="bitmask")
    plain = load_file(out)
    for name, mask in masks.items():
        if mask.ndim == 2:
            for part, value in pack_compressed(tensors[name], SparseMask(mask)).items():
                assert torch.equal(plain[name.removesuffix("weight") + part], value), (name, part)
            assert name not in plain
        else:
            assert torch.equal(plain[name], tensors[name] * mask)
    stored = Stored.open(out)
    assert set(stored.names) == set(tensors)
    for name, tensor in tensors.items():
        weight, mask = stored.read(name)
        assert weight.dtype == tensor.dtype
        if mask is not None:
            assert torch.equal(mask.mask, masks[name])
            assert torch.equal(weight, torch.where(masks[name], tensor, torch.zeros((), dtype=tensor.dtype)))
    for name, entry in Shards.open(out).entries.items():
        assert entry.start % DTYPES[entry.dtype].itemsize == 0, name  # readers view bytes as numbers


def test_trap_03_a_kept_zero_stays_kept_in_the_bitmask_layout(tmp_path):
    weight, mask = torch.tensor([[0.0, 5.0, -0.0, 0.0]]), torch.tensor([[True, True, True, False]])
    out, _ = written(tmp_path, {"w.weight": weight}, {"w.weight": mask}, layout="bitmask")
    found, kept = Stored.open(out).read("w.weight")
    assert torch.equal(kept.mask, mask)
    assert torch.signbit(found).tolist() == [[False, False, True, False]]


@settings(max_examples=60)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 20),
    chunk=st.integers(1, 64),
    unit=st.integers(1, 12),
    layout=st.sampled_from(["dense", "bitmask"]),
    seed=st.integers(0, 9),
)
def test_any_shape_and_chunk_size(tmp_path_factory, rows, columns, chunk, unit, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    tmp_path = tmp_path_factory.mktemp("any")
    weight = torch.randn(rows, columns, generator=generator)
    mask = torch.rand(rows, columns, generator=generator) < 0.5
    save_file({"w.weight": weight}, tmp_path / "in.safetensors")
    source = Shards.open(tmp_path / "in.safetensors")
    before, module.CHUNK = module.CHUNK, chunk
    try:
        entries = write_shard(
            source,
            "in.safetensors",
            tmp_path / "out.safetensors",
            {"w.weight": lambda: Given(mask, unit)},
            tmp_path / "bits",
            layout=layout,
        )
    finally:
        module.CHUNK = before
    found, _ = Stored.open(tmp_path / "out.safetensors").read("w.weight")
    assert torch.equal(found, torch.where(mask, weight, torch.zeros(())))
    join_masks([(tmp_path / "bits", entries)], tmp_path / "masks.safetensors", {"by": "me"})
    masks, body = read_masks(tmp_path / "masks.safetensors")
    assert torch.equal(masks["w.weight"].mask, mask)
    assert body["metadata"] == {"by": "me"}


class Failing:
    unit = 1

    def __call__(self, weights):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("layout", ["dense", "bitmask"])
def test_input_a_full_disk_leaves_the_old_file_and_nothing_half_written(tmp_path, tensors, layout):
    save_file(tensors, tmp_path / "in.safetensors")
    (tmp_path / "out.safetensors").write_text("old")
    (tmp_path / "bits").write_text("old")
    source = Shards.open(tmp_path / "in.safetensors")
    arguments = (source, "in.safetensors", tmp_path / "out.safetensors", {"b.weight": Failing}, tmp_path / "bits")
    with pytest.raises(OSError, match="No space"):
        write_shard(*arguments, layout=layout, overwrite=True)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_shard(*arguments, layout=layout)
    with pytest.raises(ValueError, match="'dense' or 'bitmask'"):
        write_shard(*arguments, layout="csr")
    assert (tmp_path / "out.safetensors").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bits", "in.safetensors", "out.safetensors"]


def test_a_dense_shard_has_the_header_order_and_size_of_the_source(tmp_path, tensors, masks):
    out, _ = written(tmp_path, tensors, masks)
    before, after = Shards.open(tmp_path / "in.safetensors"), Shards.open(out)
    offsets = [[e.stop - e.start for e in s.entries.values()] for s in (before, after)]
    assert offsets[0] == offsets[1]
    data = out.read_bytes()
    assert json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["format"] == "pt"


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
@pytest.mark.parametrize("layout", ["dense", "bitmask"])
def test_input_no_room_for_the_last_tensor_is_an_error_that_names_the_file(tmp_path, layout):
    import resource

    save_file({"a.weight": torch.randn(100, 100)}, tmp_path / "in.safetensors")
    source = Shards.open(tmp_path / "in.safetensors")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_shard(source, "in.safetensors", tmp_path / "out.safetensors", {}, tmp_path / "bits", layout=layout)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(tmp_path / "out.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["in.safetensors"]
