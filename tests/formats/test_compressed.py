"""Sparse layouts of compressed-tensors against their description; test_compressed_tensors.py has the library."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from resu.core.mask import SparseMask
from resu.formats.bitmask import pack_compressed, unpack_bitmask
from resu.formats.compressed import read_compressed, write_compressed
from resu.formats.compressed_config import (
    LAYOUTS,
    find_sparsity_config,
    layout_of,
    sparsity_config,
    with_sparsity_config,
    without_sparsity_config,
)
from resu.formats.stored import Stored
from tests.formats.helpers import bits, random_24, random_weight, same_bits, small
from tests.reference import bitmask as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.float8_e4m3fn]


shapes = st.lists(st.integers(1, 11), min_size=1, max_size=4).map(tuple)


# -- the layout, against its restatement ---------------------------------------------------------------


@given(shape=shapes, seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES), p=st.sampled_from([0.0, 0.4, 1.0]))
def test_parts_are_those_of_the_description_and_come_back(shape, seed, dtype, p):
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < p
    weight = random_weight(shape, dtype, keep, seed)
    parts = pack_compressed(weight, SparseMask(keep))
    expected = reference.encode(bits(weight).numpy(), keep.numpy())
    assert list(parts) == list(expected)
    for part, value in expected.items():
        assert torch.equal(bits(parts[part]), bits(torch.from_numpy(value))), part
    back, mask = unpack_bitmask(parts)
    assert same_bits(back, weight)
    assert mask == SparseMask(keep)
    theirs = {part: torch.from_numpy(value) for part, value in expected.items()}
    assert torch.equal(unpack_bitmask(theirs)[0], bits(weight))


@given(rows=st.integers(1, 6), groups=st.integers(1, 7), seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
def test_parts_of_the_24_layout_are_those_of_the_description(rows, groups, seed, dtype):
    keep = random_24(rows, groups, seed)
    weight = random_weight((rows, 4 * groups), dtype, keep, seed)
    parts = pack_compressed(weight, SparseMask(keep), "sparse-24-bitmask")
    expected = reference.encode_24(bits(weight).numpy(), keep.numpy())
    assert list(parts) == list(expected)
    for part, value in expected.items():
        assert torch.equal(bits(parts[part]), bits(torch.from_numpy(value))), part
    back, mask = unpack_bitmask(parts)
    assert same_bits(back, weight)
    assert mask == SparseMask(keep)
    there, there_keep = reference.decode(
        {part: bits(value).numpy() for part, value in parts.items()} | {"shape": parts["shape"].numpy()}
    )
    assert torch.equal(torch.from_numpy(there), bits(weight))
    assert torch.equal(torch.from_numpy(there_keep), keep)


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        (torch.tensor([[True, True, True, False]]), "1 of 1 groups of 4"),
        (torch.tensor([[True, True, False, False], [True, False, False, False]]), "1 of 2 groups of 4"),
        (torch.ones(2, 6, dtype=torch.bool), r"columns in fours, got shape \(2, 6\)"),
        (torch.ones(8, dtype=torch.bool), "needs a matrix"),
    ],
)
def test_masks_that_are_not_24_are_refused(keep, said):
    with pytest.raises(ValueError, match=said):
        pack_compressed(torch.ones(keep.shape), SparseMask(keep), "sparse-24-bitmask")


def test_layouts_that_are_not_known_are_refused(tmp_path):
    keep = SparseMask(torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"layout 'csr' is not known; known: sparse-bitmask, sparse-24-bitmask"):
        pack_compressed(torch.ones(2, 2), keep, "csr")
    with pytest.raises(ValueError, match=r"layout 'csr' is not known"):
        write_compressed({}, {}, tmp_path / "m", layout="csr")
    with pytest.raises(ValueError, match="single number"):
        pack_compressed(torch.tensor(1.0), SparseMask(torch.tensor(True)))
    assert list(tmp_path.iterdir()) == []


# -- the config ----------------------------------------------------------------------------------------


def test_the_block_is_found_wherever_a_version_has_put_it():
    block = sparsity_config("sparse-bitmask", ["fc.weight"], pruned=1, numel=4, ignore=["lm_head"])
    assert block == {
        "format": "sparse-bitmask",
        "targets": ["fc"],
        "ignore": ["lm_head"],
        "global_sparsity": 0.25,
        "sparsity_structure": "unstructured",
    }
    config = with_sparsity_config({"model_type": "x", "sparsity_config": {"format": "old"}}, block)
    assert config == {
        "model_type": "x",
        "quantization_config": {"quant_method": "compressed-tensors", "sparsity_config": block},
    }
    for place in (config, {"sparsity_config": block}, {"compression_config": {"sparsity_config": block}}):
        assert find_sparsity_config(place) == block
        assert layout_of(place) == "sparse-bitmask"
        assert without_sparsity_config(place) in ({}, {"model_type": "x"})
    assert find_sparsity_config({"quantization_config": {"quant_method": "gptq"}}) is None
    assert layout_of({"sparsity_config": {"format": "sparse_24_bitmask"}}) == "sparse-24-bitmask"
    with pytest.raises(ValueError, match="'marlin-24'"):
        layout_of({"sparsity_config": {"format": "marlin-24"}})
    with pytest.raises(ValueError, match="must be an object"):
        find_sparsity_config({"sparsity_config": "sparse-bitmask"})
    with pytest.raises(ValueError, match="'csr' is not known"):
        sparsity_config("csr", [], pruned=0, numel=0)


def test_what_a_config_says_of_quantization_stays():
    block = sparsity_config("sparse-bitmask", ["fc.weight"], pruned=1, numel=4)
    groups = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
    config = {"quantization_config": groups}
    assert with_sparsity_config(config, block)["quantization_config"] == {**groups, "sparsity_config": block}
    assert without_sparsity_config(with_sparsity_config(config, block)) == config
    other = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    assert without_sparsity_config(other) == other
    with pytest.raises(ValueError, match="quantized by 'gptq'"):
        with_sparsity_config(other, block)


# -- folders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_comes_back_bit_for_bit(layout, dtype, tmp_path):
    state, keep = small(layout, dtype)
    write_compressed(state, keep, tmp_path / "m", layout=layout, config={"model_type": "net"})
    back, masks, block = read_compressed(tmp_path / "m")
    assert set(back) == set(state)
    assert all(same_bits(back[name], state[name]) for name in state)
    assert masks == {name: SparseMask(mask) for name, mask in keep.items()}
    assert block["format"] == layout
    numel = sum(tensor.numel() for tensor in state.values())
    assert block["global_sparsity"] == sum(int((~mask).sum()) for mask in keep.values()) / numel
    assert json.loads((tmp_path / "m/config.json").read_text())["model_type"] == "net"
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
    assert all(
        same_bits(*pair)
        for pair in zip(read_compressed(tmp_path / "m/model.safetensors")[0].values(), back.values(), strict=True)
    )


@pytest.mark.parametrize("spelling", ["sparse_bitmask", "sparse-bitmask"])
@pytest.mark.parametrize("place", [None, "quantization_config", "compression_config"])
def test_old_spellings_and_places_are_read_and_parts_may_be_in_different_shards(spelling, place, tmp_path):
    state, keep = small()
    tensors = {"fc.bias": state["fc.bias"]}
    for name, mask in keep.items():
        parts = reference.encode(state[name].numpy(), mask.numpy())
        tensors |= {name.removesuffix("weight") + part: torch.from_numpy(value) for part, value in parts.items()}
    shards = {f"model-0000{i}-of-00003.safetensors": list(tensors)[i - 1 :: 3] for i in (1, 2, 3)}
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, names in shards.items() for name in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    block = {"format": spelling, "targets": ["Linear"], "ignore": ["lm_head"]}
    config = {"sparsity_config": block} if place is None else {place: {"sparsity_config": block}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    back, masks, found = read_compressed(tmp_path)
    assert set(back) == set(state)
    assert all(same_bits(back[name], state[name]) for name in state)
    assert masks == {name: SparseMask(mask) for name, mask in keep.items()}
    assert found == block


def test_stored_weights_are_seen_by_name_whatever_their_layout(tmp_path):
    state, keep = small(dtype=torch.bfloat16)
    write_compressed(state, {"fc.weight": keep["fc.weight"]}, tmp_path / "m")
    stored = Stored.open(tmp_path / "m")
    assert sorted(stored.names) == sorted(state)
    assert {name: stored.shape(name) for name in stored.names} == {name: state[name].shape for name in state}
    assert {stored.dtype(name) for name in stored.names} == {torch.bfloat16}
    assert [stored.layout(name) for name in ("fc.weight", "head.weight")] == ["sparse-bitmask", "dense"]
    kept = int(keep["fc.weight"].sum())
    assert stored.nbytes("fc.weight") == 2 * kept + 10 * 3 + 8 * 10 + 8 * 2
    assert stored.read("head.weight")[1] is None


def test_trap_03_kept_zeros_and_minus_zeros_come_back(tmp_path):
    weight = torch.tensor([[0.0, -0.0, 0.0, 7.0], [-0.0, 0.0, 0.0, 0.0]])
    keep = torch.tensor([[True, True, False, False], [True, False, False, True]])
    weight[0, 3] = -0.0  # pruned
    for layout in LAYOUTS:
        write_compressed({"weight": weight}, {"weight": keep}, tmp_path / layout, layout=layout)
        back, masks, _ = read_compressed(tmp_path / layout)
        assert masks["weight"] == SparseMask(keep)
        assert torch.equal(torch.signbit(back["weight"]), torch.signbit(weight) & keep)


def test_trap_41_ties_are_stored_once_and_come_back_as_ties(tmp_path):
    weight = torch.arange(1.0, 9.0).view(2, 4)
    keep = weight > 4
    weight[~keep] = 0
    state = {"wte.weight": weight, "head.weight": weight, "part.weight": weight[0]}
    write_compressed(state, {"head.weight": keep, "wte.weight": keep}, tmp_path / "m")
    assert set(load_file(tmp_path / "m/model.safetensors")) == {
        "part.weight",
        *(f"wte.{part}" for part in ("shape", "compressed", "bitmask", "row_offsets")),
    }
    back, masks, _ = read_compressed(tmp_path / "m")
    assert back["head.weight"] is back["wte.weight"]
    assert list(masks) == ["wte.weight"]
    with pytest.raises(ValueError, match="are one tensor, but their masks differ"):
        write_compressed(state, {"head.weight": keep, "wte.weight": ~keep}, tmp_path / "n")


def test_input_what_does_not_fit_writes_nothing(tmp_path):
    state, keep = small()
    for masks, said in (
        ({"no.weight": keep["fc.weight"]}, "belongs to no tensor"),
        ({"fc.weight": keep["head.weight"]}, r"mask 'fc.weight' has shape"),
        ({"fc.weight": ~keep["fc.weight"]}, r"'fc.weight' is not zero at \d+ positions"),
        ({"fc.bias": torch.ones(10, dtype=torch.bool)}, "parameters called 'weight', not 'fc.bias'"),
    ):
        with pytest.raises(ValueError, match=said):
            write_compressed(state, masks, tmp_path / "m")
    with pytest.raises(ValueError, match=r"mask 'fc.weight' does not fit sparse-24-bitmask: "):
        write_compressed(state, keep, tmp_path / "m", layout="sparse-24-bitmask")
    with pytest.raises(TypeError, match="bool"):
        write_compressed(state, {"fc.weight": keep["fc.weight"].float()}, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_there_are_not_replaced_unasked(tmp_path):
    state, keep = small()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"config.json is there already; pass overwrite=True"):
        write_compressed(state, keep, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    write_compressed(state, keep, tmp_path, overwrite=True)
    assert layout_of(json.loads((tmp_path / "config.json").read_text())) == "sparse-bitmask"


# -- damage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_every_flipped_byte_is_noticed_or_harmless(layout, tmp_path):
    keep = random_24(2, 2)
    weight = random_weight((2, 8), torch.float16, keep)
    write_compressed({"w.weight": weight, "w.bias": torch.ones(1)}, {"w.weight": keep}, tmp_path, layout=layout)
    path = tmp_path / "model.safetensors"
    good = path.read_bytes()
    data = 8 + int.from_bytes(good[:8], "little")
    for i in range(len(good)):
        path.write_bytes(good[:i] + bytes([good[i] ^ (1 << i % 8)]) + good[i + 1 :])
        try:
            back, masks, _ = read_compressed(tmp_path)
        except ValueError:
            pass
        else:
            assert i < data, f"byte {i} of the data was not noticed"
            assert same_bits(back["w.weight"], weight), f"byte {i}"
            assert masks == {"w.weight": SparseMask(keep)}, f"byte {i}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_every_truncation_is_refused_by_name(layout, tmp_path):
    state, keep = small(layout)
    write_compressed(state, keep, tmp_path, layout=layout)
    path = tmp_path / "model.safetensors"
    good = path.read_bytes()
    for length in {*range(0, len(good), 97), 1, 7, 8, 9, len(good) - 1}:
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            read_compressed(tmp_path)
    path.write_bytes(good + b"\0")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        read_compressed(tmp_path)


def test_input_parts_that_are_missing_or_disagree_are_named(tmp_path):
    state, keep = small()
    write_compressed(state, keep, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)  # without the header of this library: as another one would have written them
    for change, said in (
        ({"fc.shape": None}, r"'fc.compressed' has no fc.bitmask or no fc.shape"),
        ({"fc.bitmask": None}, r"'fc.compressed' has no fc.bitmask or no fc.shape"),
        ({"fc.weight": torch.ones(10, 24)}, "'fc.weight' both dense and in a bitmask layout"),
        ({"fc.shape": torch.tensor([24, 10])}, "'fc.weight' in bitmask layout is damaged"),
        ({"fc.shape": torch.tensor([-10, 24])}, "'fc.weight' in bitmask layout is damaged"),
        ({"fc.shape": torch.tensor([2**62, 24])}, "'fc.weight' in bitmask layout is damaged"),
        ({"fc.compressed": tensors["fc.compressed"][1:].clone()}, r"'fc.weight' holds \d+ values, its bitmask"),
        ({"fc.bitmask": tensors["fc.bitmask"] ^ 1}, "'fc.weight'"),
        ({"fc.bitmask": tensors["fc.bitmask"].view(5, 6)}, "'fc.weight' in bitmask layout is damaged"),
        ({"fc.row_offsets": tensors["fc.row_offsets"] + 1}, "row offsets of 'fc.weight'"),
    ):
        save_file({k: v for k, v in (tensors | change).items() if v is not None}, path)
        with pytest.raises(ValueError, match=said):
            read_compressed(tmp_path)
    save_file({"fc.bias": state["fc.bias"]}, path)
    with pytest.raises(ValueError, match=r"announces 'sparse-bitmask', but no weight is stored so"):
        read_compressed(tmp_path)
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        read_compressed(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        read_compressed(tmp_path)


def test_input_a_pickle_and_nothing_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        read_compressed(tmp_path / "no")
    with pytest.raises(ValueError, match="no safetensors file"):
        read_compressed(tmp_path)
    torch.save({"w": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is a pickle"):
        read_compressed(tmp_path)
