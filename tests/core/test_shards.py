"""Shards: what is read is what safetensors wrote; what does not fit together is refused by name."""

import json
import shutil
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from resu.core.io import FileFormatError
from resu.core.shards import DTYPES, INDEX, Shards, read_header

TENSORS = {
    "a.weight": torch.arange(12.0).view(3, 4),
    "a.bias": torch.arange(3, dtype=torch.float16),
    "b.weight": torch.randn(2, 3, 5).to(torch.bfloat16),
    "number": torch.tensor(7),
    "nothing": torch.zeros(0, 4),
    "flags": torch.tensor([True, False]),
    "small": torch.randn(4).to(torch.float8_e4m3fn),
}


@pytest.fixture
def folder(tmp_path):
    """Two shards and their index."""
    names = list(TENSORS)
    parts = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, part in parts.items():
        save_file({n: TENSORS[n] for n in part}, tmp_path / file, metadata={"format": "pt"})
    places = {n: file for file, part in parts.items() for n in part}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return tmp_path


def as_bytes(x):
    return x.reshape(-1).view(torch.uint8) if x.numel() else x.reshape(-1).to(torch.uint8)


def test_tensors_are_read_bit_for_bit(folder):
    shards = Shards.open(folder)
    assert set(shards.names) == set(TENSORS)
    assert shards.files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, tensor in TENSORS.items():
        found = shards.read(name)
        assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype) == (shards.shape(name), shards.dtype(name))
        assert torch.equal(as_bytes(found), as_bytes(tensor))
        assert shards.nbytes(name) == tensor.numel() * tensor.element_size()
    assert shards.file_of("number") == "model-00002-of-00002.safetensors"
    assert shards.metadata["model-00001-of-00002.safetensors"] == {"format": "pt"}


@settings(max_examples=50)
@given(size=st.integers(1, 20), first=st.integers(0, 12), last=st.integers(0, 12))
def test_chunks_are_the_flat_tensor_in_order(tmp_path_factory, size, first, last):
    path = tmp_path_factory.mktemp("chunks") / "model.safetensors"
    save_file({"w": TENSORS["a.weight"], "v": TENSORS["b.weight"]}, path)
    first, last = min(first, last), max(first, last)
    chunks = [c.clone() for c in Shards.open(path).chunks("w", size, (first, last))]
    assert all(len(c) <= size for c in chunks)
    assert torch.equal(torch.cat(chunks), TENSORS["a.weight"].view(-1)[first:last])


def test_order_is_that_of_the_bytes(tmp_path):
    save_file(
        {"z": torch.zeros(2), "a": torch.ones(2), "wide": torch.ones(2, dtype=torch.float64)},
        tmp_path / "m.safetensors",
    )
    entries, _ = read_header(tmp_path / "m.safetensors")
    starts = [entry.start for entry in entries.values()]
    assert starts == sorted(starts)
    assert Shards.open(tmp_path / "m.safetensors").names == list(entries)


def test_a_folder_without_index_and_a_single_file(folder, tmp_path):
    (folder / INDEX).unlink()
    (folder / "masks.safetensors").write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    assert set(Shards.open(folder).names) == set(TENSORS)
    assert set(Shards.open(folder / "model-00001-of-00002.safetensors").names) < set(TENSORS)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002.safetensors is missing"):
        Shards.open(folder)


def test_a_missing_shard_is_named(folder):
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002.safetensors is missing .* index names it"):
        Shards.open(folder)


@pytest.mark.parametrize("left", [0, 4, 60, -1, -20])
def test_a_truncated_shard_is_named(folder, left):
    file = folder / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(FileFormatError, match=r"model-00001-of-00002.safetensors .*(truncated|damaged)"):
        Shards.open(folder)


def test_a_file_that_is_longer_than_it_says_is_damaged(folder):
    with open(folder / "model-00001-of-00002.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(FileFormatError, match="damaged"):
        Shards.open(folder)


def test_truncation_while_reading_is_found(folder):
    shards = Shards.open(folder)
    file = folder / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    last = max((n for n in shards.names if shards.file_of(n) == file.name), key=lambda n: shards.entries[n].stop)
    with pytest.raises(FileFormatError, match=r"truncated while being read"):
        shards.read(last)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("a.bias"), "'a.bias' should be nowhere"),
        (lambda m: m.update({"c": "model-00001-of-00002.safetensors"}), "'c' should be in .* it is nowhere"),
        (
            lambda m: m.update({"a.bias": "model-00002-of-00002.safetensors"}),
            "'a.bias' should be in .*00002.* it is in .*00001",
        ),
        (lambda m: m.update({"c": "../secret.safetensors"}), "no safetensors file of that folder"),
        (lambda m: m.update({"c": "weights.bin"}), "no safetensors file of that folder"),
        (lambda m: m.update({"c": 3}), "damaged"),
    ],
)
def test_an_index_that_disagrees_with_the_files(folder, change, message):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(FileFormatError, match=message):
        Shards.open(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', "{", "\x00"])
def test_an_index_that_is_none(folder, text):
    (folder / INDEX).write_text(text)
    with pytest.raises(FileFormatError, match=r"index.json is damaged"):
        Shards.open(folder)


def header(body, data=b""):
    text = json.dumps(body).encode() if not isinstance(body, bytes) else body
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 1 << 40) + b"{}",
        header(b"not json"),
        header([]),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"\0" * 4),
        header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"\0" * 4),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"\0" * 8),
        header({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, b"\0" * 4),
        header({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"\0" * 4),
        header({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
        header(
            {
                "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]},
            },
            b"\0" * 6,
        ),
        header(b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": {"dtype": "U8"}}', b"\0"),
        header(b"[" * 100_000),
    ],
)
def test_input_headers_that_lie_are_refused(tmp_path, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(FileFormatError, match=r"model.safetensors"):
        Shards.open(tmp_path)


@settings(max_examples=100)
@given(place=st.integers(0, 400), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_header_never_reads_beyond_the_file(tmp_path_factory, place, bit):
    path = tmp_path_factory.mktemp("flip") / "model.safetensors"
    save_file({n: t for n, t in TENSORS.items() if t.numel()}, path)
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << bit
    path.write_bytes(data)
    try:
        shards = Shards.open(path)
        for name in shards.names:
            shards.read(name)
    except FileFormatError:
        pass


def test_input_pickles_are_refused_with_advice(tmp_path):
    for name in ("pytorch_model.bin", "model.pt", "model.pth"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        torch.save(TENSORS["a.weight"], folder / name)
        for path in (folder, folder / name):
            with pytest.raises(ValueError, match=r"is a pickle.*safetensors"):
                Shards.open(path)


def test_input_wrong_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        Shards.open(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no safetensors file"):
        Shards.open(tmp_path)
    (tmp_path / "model.gguf").write_text("x")
    with pytest.raises(ValueError, match="no safetensors file"):
        Shards.open(tmp_path / "model.gguf")


def test_a_folder_with_two_checkpoints_is_not_guessed_at(folder):
    save_file({"c": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"both model.safetensors and model.safetensors.index.json"):
        Shards.open(folder)


def test_a_tensor_that_is_in_two_files_is_an_error(folder):
    (folder / INDEX).unlink()
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "other.safetensors")
    with pytest.raises(FileFormatError, match=r"is in model-00001-of-00002.safetensors and again in other.safetensors"):
        Shards.open(folder)


def test_dtypes_torch_does_not_have_are_named(tmp_path):
    body = {"a": {"dtype": "F6_E3M2", "shape": [4], "data_offsets": [0, 3]}}
    (tmp_path / "model.safetensors").write_bytes(header(body, b"\0" * 3))
    shards = Shards.open(tmp_path)
    with pytest.raises(FileFormatError, match=r"'a' .* dtype F6_E3M2"):
        shards.read("a")
    with pytest.raises(KeyError, match="no tensor 'b'"):
        shards.read("b")


def test_every_known_dtype_is_what_safetensors_calls_it(tmp_path):
    tensors = {code: torch.zeros(2, 2).to(dtype) for code, dtype in DTYPES.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    shards = Shards.open(tmp_path)
    assert {name: entry.dtype for name, entry in shards.entries.items()} == {code: code for code in DTYPES}
    assert {name: t.dtype for name, t in load_file(tmp_path / "model.safetensors").items()} == DTYPES


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ([1], "not a list"),
        ("text", "not a text"),
        (3, "not a number"),
        (None, "not null"),
        ({}, 'has no "weight_map"'),
        ({"weight_map": 5}, '"weight_map" is a number'),
        ({"weight_map": ["a"]}, '"weight_map" is a list'),
        ({"weight_map": None}, '"weight_map" is null'),
        ({"weight_map": {"a": ["x"]}}, "for tensor 'a' it has a list"),
        ({"weight_map": {"a": {"x": 1}}}, "for tensor 'a' it has an object"),
    ],
)
def test_input_an_index_of_the_wrong_kind_says_what_it_should_be(folder, index, says):
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(FileFormatError) as caught:
        Shards.open(folder)
    told = str(caught.value)
    assert told.startswith(str(folder / INDEX))
    assert 'must be an object with "weight_map": {tensor name: file name}' in told
    assert told.endswith(says)


def test_input_an_index_with_metadata_of_the_wrong_kind(folder):
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, "metadata": [1]}))
    with pytest.raises(FileFormatError, match=r'index.json is damaged: its "metadata" must be an object, not a list'):
        Shards.open(folder)


@pytest.mark.parametrize("header", ["[1]", '{"a": 1}', '{"a": {"dtype": "F32"}}', '{"__metadata__": [1]}'])
def test_input_a_header_of_the_wrong_kind_says_what_it_should_be(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    with pytest.raises(FileFormatError, match=r"model.safetensors .* object with dtype, shape and data_offsets"):
        read_header(path)
