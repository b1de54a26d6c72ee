"""Models between layouts: every bit is kept, nothing is half-written, what does not fit is refused."""

import errno
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from resu import load_checkpoint, save_checkpoint
from resu.core import io
from resu.core.mask import SparseMask
from resu.core.mask_files import read_masks, write_masks
from resu.core.pattern import NM
from resu.formats.compressed import read_compressed, write_compressed
from resu.formats.compressed_config import layout_of
from resu.formats.stored import Stored
from resu.formats.validate import validate
from resu.integrations.convert import convert
from tests.formats.helpers import WORDS, same_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.float8_e4m3fn]


def weights(dtype=torch.float32, pattern=None):
    """Any bits where kept (NaN payloads and minus zeros too), some kept zeros, and +0.0 elsewhere."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "a.weight": (8, 12),
        "b.weight": (5, 16),
        "conv.weight": (4, 2, 3, 3),
        "experts": (2, 4, 8),
        "n.weight": (7,),
    }
    state, masks = {}, {}
    for name, shape in shapes.items():
        scores = torch.rand(shape, generator=generator)
        keep = NM(2, 4).mask(scores, 0.5) if pattern and len(shape) == 2 else scores < 0.4
        raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator).to(torch.uint8)
        raw = raw.view(WORDS[dtype.itemsize]).view(shape).masked_fill(~keep, 0)
        raw[torch.rand(shape, generator=generator) < 0.2] = 0
        state[name], masks[name] = raw.view(dtype), SparseMask(keep)
    state["a.bias"] = torch.randn(8, generator=generator).to(dtype)
    return state, masks


def folder(path, state, masks, shards=1):
    """A pruned model folder: dense shards, index, config, tokenizer, masks, report."""
    path.mkdir()
    names = list(state)
    if shards == 1:
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    else:
        files = [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
        for i, file in enumerate(files):
            save_file({name: state[name] for name in names[i::shards]}, path / file, metadata={"format": "pt"})
        places = {name: files[i % shards] for i, name in enumerate(names)}
        index = {"metadata": {"total_size": 1, "mine": "kept"}, "weight_map": places}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "ü": 1}))
    (path / "tokenizer.json").write_text("{}")
    (path / "generation_config.json").write_text('{"top_p": 0.5}')
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text("{}")
    write_masks(masks, path / "masks.safetensors", {"method": "magnitude"})
    layers = [{"name": name, "kept": mask.n_active} for name, mask in masks.items()]
    (path / "pruning.json").write_text(json.dumps({"method": "magnitude", "layers": layers}))
    return path


def contents(path):
    """Every weight and mask of a folder, read back; parts of a weight put together."""
    stored = Stored.open(path)
    return {name: stored.read(name)[0] for name in stored.names}


def files(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_there_and_back_keeps_every_bit_and_every_file(dtype, shards, tmp_path):
    state, masks = weights(dtype)
    source = folder(tmp_path / "source", state, masks, shards)
    report = convert(source, tmp_path / "small", "bitmask")
    assert (report["layout"], report["packed"], report["dense"]) == ("sparse-bitmask", 2, 3)
    assert report["bytes_before"] == sum(t.numel() * t.element_size() for t in state.values())
    stored = Stored.open(tmp_path / "small")
    assert set(stored.packed) == {"a.weight", "b.weight"}
    assert all(stored.read_mask(name) == masks[name] for name in stored.packed)
    assert layout_of(json.loads((tmp_path / "small/config.json").read_text())) == "sparse-bitmask"
    convert(tmp_path / "small", tmp_path / "back", "dense")
    for result in (tmp_path / "small", tmp_path / "back"):
        found = contents(result)
        assert set(found) == set(state)
        assert all(same_bits(found[name], state[name]) for name in state)
        assert files(result) == files(source)
        assert read_masks(result / "masks.safetensors")[0] == masks
        assert read_masks(result / "masks.safetensors")[1]["metadata"] == {"method": "magnitude"}
        for file in ("tokenizer.json", "generation_config.json", "1_Pooling/config.json"):
            assert (result / file).read_bytes() == (source / file).read_bytes()
        wrong = [each for each in validate(result)["violations"] if "NaN" not in each["problem"]]
        assert wrong == []
    assert json.loads((tmp_path / "back/config.json").read_text()) == {"model_type": "llama", "ü": 1}
    if shards > 1:
        index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
        assert index["metadata"] == {"mine": "kept", "total_size": report["bytes_before"]}
        assert index["weight_map"] == json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_24_there_and_back(dtype, tmp_path):
    state, masks = weights(dtype, pattern=True)
    source = folder(tmp_path / "source", state, masks)
    convert(source, tmp_path / "small", "sparse-24")
    stored = Stored.open(tmp_path / "small")
    assert {name: stored.layout(name) for name in stored.packed} == dict.fromkeys(
        ("a.weight", "b.weight"), "sparse-24-bitmask"
    )
    convert(tmp_path / "small", tmp_path / "other", "bitmask")
    convert(tmp_path / "other", tmp_path / "back", "dense")
    for result in ("small", "other", "back"):
        found = contents(tmp_path / result)
        assert all(same_bits(found[name], state[name]) for name in state)


def test_a_model_of_another_library_becomes_dense_with_its_masks_beside(tmp_path):
    state, masks = weights()
    matrices = {name: masks[name] for name in ("a.weight", "b.weight", "conv.weight", "n.weight")}
    write_compressed(state, matrices, tmp_path / "source", config={"model_type": "x"})
    convert(tmp_path / "source", tmp_path / "out", "dense")
    assert all(same_bits(load_file(tmp_path / "out/model.safetensors")[name], state[name]) for name in state)
    assert read_masks(tmp_path / "out/masks.safetensors")[0] == matrices
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"model_type": "x"}
    report = json.loads((tmp_path / "out/pruning.json").read_text())
    assert {layer["name"]: layer["kept"] for layer in report["layers"]} == {n: m.n_active for n, m in matrices.items()}
    # What is there and was made by a conversion may be replaced if that is asked for.
    with pytest.raises(FileExistsError, match="overwrite=True"):
        convert(tmp_path / "source", tmp_path / "out", "dense")
    convert(tmp_path / "out", tmp_path / "again", "bitmask")
    convert(tmp_path / "source", tmp_path / "again", "dense", overwrite=True)
    assert all(same_bits(load_file(tmp_path / "again/model.safetensors")[name], state[name]) for name in state)


def test_minus_zeros_that_are_pruned_become_zeros(tmp_path):
    state, masks = weights()
    source = folder(tmp_path / "source", state, masks)
    minus = {n: torch.where(masks[n].mask, t, -0.0) if n in masks else t for n, t in state.items()}
    save_file(minus, source / "model.safetensors")
    convert(source, tmp_path / "out", "dense")
    found = contents(tmp_path / "out")
    assert all(same_bits(found[name], state[name]) for name in state)


def test_trap_41_ties_stay_ties(tmp_path):
    weight = torch.arange(1.0, 9.0).view(2, 4) * torch.tensor([1.0, 0.0, 0.0, 1.0])
    state = {"wte.weight": weight, "head.weight": weight}
    write_compressed(state, {"wte.weight": weight != 0}, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", "dense")
    assert set(load_file(tmp_path / "out/model.safetensors")) == {"wte.weight"}
    back = read_compressed(tmp_path / "out")[0]
    assert back["head.weight"] is back["wte.weight"]
    write_masks({"head.weight": SparseMask(weight != 0)}, tmp_path / "other_name.npz")
    convert(tmp_path / "out", tmp_path / "again", "bitmask", masks=tmp_path / "other_name.npz")
    assert set(Stored.open(tmp_path / "again").packed) == {"wte.weight"}


def test_one_file_becomes_one_file(tmp_path):
    state, masks = weights()
    save_file(state, tmp_path / "a.safetensors")
    write_masks(masks, tmp_path / "m.npz", {"by": "hand"})
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "bitmask", masks=tmp_path / "m.npz")
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "dense")
    for file in ("b", "c"):
        found = contents(tmp_path / f"{file}.safetensors")
        assert all(same_bits(found[name], state[name]) for name in state)
    beside = read_masks(tmp_path / "c.masks.safetensors")[0]
    assert beside == {name: masks[name] for name in ("a.weight", "b.weight")}
    with pytest.raises(FileExistsError):
        convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "dense")
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "dense", overwrite=True)


def test_a_checkpoint_keeps_all_that_is_in_it(tmp_path):
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2))
    mask = SparseMask.from_magnitude(model[0].weight, 0.5)
    mask.apply_(model[0].weight)
    extra = {"optimizer": {"step": 3, "m": torch.ones(2)}}
    save_checkpoint(model, tmp_path / "a.safetensors", masks={"0.weight": mask}, extra=extra, metadata={"epoch": 1})
    assert convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "bitmask")["packed"] == 1
    assert convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "dense")["packed"] == 0
    found = load_checkpoint(tmp_path / "c.safetensors")
    assert all(same_bits(found.state[name], tensor) for name, tensor in model.state_dict().items())
    assert (found.masks, found.metadata) == ({"0.weight": mask}, {"epoch": 1})
    assert torch.equal(found.extra["optimizer"]["m"], torch.ones(2))
    with pytest.raises(ValueError, match="dense or bitmask"):
        convert(tmp_path / "a.safetensors", tmp_path / "d.safetensors", "sparse-24")
    (tmp_path / "f").mkdir()
    (tmp_path / "a.safetensors").rename(tmp_path / "f/model.safetensors")
    with pytest.raises(ValueError, match="is a checkpoint of resu; convert that file"):
        convert(tmp_path / "f", tmp_path / "g", "bitmask")


def test_progress_is_told(tmp_path):
    state, masks = weights()
    told = []
    source = folder(tmp_path / "source", state, masks, 3)
    convert(source, tmp_path / "out", "bitmask", progress=lambda *args: told.append(args))
    assert [(done, total) for done, total, _ in told] == [(i, 6) for i in range(1, 7)]


# -- refusals ------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    return folder(tmp_path / "source", *weights())


def refused(source, tmp_path, said, to="bitmask", error=ValueError, **options):
    before = files(tmp_path)
    with pytest.raises(error, match=said):
        convert(source, tmp_path / "out", to, **options)
    assert files(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_input_what_does_not_fit_is_refused_and_nothing_written(source, tmp_path):
    masks = weights()[1]
    refused(source, tmp_path, "known: dense, bitmask, sparse-24", to="csr")
    refused(tmp_path / "no", tmp_path, "no file or folder", error=FileNotFoundError)
    refused(source, tmp_path, "no file", masks=tmp_path / "no.npz", error=FileNotFoundError)
    refused(source, tmp_path, r"2 of 5 masks are not 2:4: a.weight \(\d+ of 24 groups", to="sparse-24")
    for wrong, said in (
        ({"x.weight": masks["a.weight"]}, "'x.weight' belongs to no tensor"),
        ({"a.weight": masks["b.weight"]}, r"mask 'a.weight' has shape \(5, 16\), the weight \(8, 12\)"),
        ({"a.weight": SparseMask(~masks["a.weight"].mask)}, r"'a.weight' is not zero at \d+ positions"),
    ):
        write_masks(wrong, tmp_path / "m.npz", overwrite=True)
        refused(source, tmp_path, said, masks=tmp_path / "m.npz")
    (tmp_path / "m.npz").unlink()
    (source / "masks.safetensors").unlink()
    refused(source, tmp_path, "A mask is not guessed from zeros")
    (source / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    write_masks({"a.weight": masks["a.weight"]}, source / "masks.safetensors")
    refused(source, tmp_path, "quantized by 'gptq'")


def test_input_masks_that_disagree_are_refused(tmp_path):
    state, masks = weights()
    write_compressed(state, {"a.weight": masks["a.weight"]}, tmp_path / "source")
    write_masks({"a.weight": SparseMask(~masks["a.weight"].mask)}, tmp_path / "m.npz")
    refused(
        tmp_path / "source", tmp_path, "'a.weight' is stored with another mask", to="dense", masks=tmp_path / "m.npz"
    )


def test_input_damage_anywhere_leaves_nothing(source, tmp_path):
    convert(source, tmp_path / "small", "bitmask")
    path = tmp_path / "small/model.safetensors"
    good = path.read_bytes()
    for place in (20, len(good) // 2, len(good) - 3):
        path.write_bytes(good[:place] + bytes([good[place] ^ 16]) + good[place + 1 :])
        refused(tmp_path / "small", tmp_path, "damaged|checksum", to="dense")
    path.write_bytes(good[:-5])
    refused(tmp_path / "small", tmp_path, "truncated", to="dense")


def test_input_a_damaged_report_is_named(source, tmp_path):
    for text in ("[", "[]", "{} x"):
        (source / "pruning.json").write_text(text)
        refused(source, tmp_path, "pruning.json is damaged")


def test_input_places_that_cannot_be_written_to(source, tmp_path):
    (tmp_path / "pruning.json").write_text("{}")  # as if the folder above were an earlier result
    before = files(tmp_path)
    for out in (source, source / "out", tmp_path):
        with pytest.raises(ValueError, match=r"must not be the source .*, inside or above it"):
            convert(source, out, "bitmask", overwrite=True)
    file, masks = source / "model.safetensors", source / "masks.safetensors"
    with pytest.raises(ValueError, match="is read and would be replaced"):
        convert(file, masks, "bitmask", masks=masks, overwrite=True)
    assert files(tmp_path) == before
    (tmp_path / "pruning.json").unlink()
    with pytest.raises(FileNotFoundError, match="make it first"):
        convert(source, tmp_path / "no" / "out", "bitmask")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("years")
    for overwrite in (False, True):  # no earlier result, so never replaced
        with pytest.raises(FileExistsError):
            convert(source, tmp_path / "taken", "bitmask", overwrite=overwrite)
    assert (tmp_path / "taken" / "thesis.tex").read_text() == "years"
    with pytest.raises(ValueError, match="holds masks, not weights"):
        convert(source / "masks.safetensors", tmp_path / "out.safetensors", "dense")
    file = source / "model.safetensors"
    with pytest.raises(ValueError, match=r"is a file and .* a folder"):
        convert(file, tmp_path / "taken", "dense")
    with pytest.raises(ValueError, match=r"name a .safetensors file to write"):
        convert(file, tmp_path / "out.bin", "dense")


def test_input_a_full_disk_leaves_the_old_result_whole(source, tmp_path, monkeypatch):
    convert(source, tmp_path / "out", "bitmask")
    before = {file: (tmp_path / "out" / file).read_bytes() for file in files(tmp_path / "out")}

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(io.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        convert(source, tmp_path / "out", "dense", overwrite=True)
    monkeypatch.undo()
    assert {file: (tmp_path / "out" / file).read_bytes() for file in files(tmp_path / "out")} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


# -- a real model --------------------------------------------------------------------------------------


def test_a_pruned_llama_goes_to_bitmask_and_comes_back_as_transformers_reads_it(stories, tmp_path):
    from transformers import AutoModelForCausalLM

    from resu.integrations.checkpoint import prune_checkpoint

    prune_checkpoint(stories, tmp_path / "pruned", 0.5, "magnitude")
    report = convert(tmp_path / "pruned", tmp_path / "small", "bitmask")
    assert report["dense"] == 0
    assert report["bytes_after"] < 0.65 * report["bytes_before"]
    assert validate(tmp_path / "small", sparsity=0.5)["violations"] == []
    convert(tmp_path / "small", tmp_path / "back", "dense")
    there = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").state_dict()
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert set(there) == set(back)
    assert all(same_bits(there[name], back[name]) for name in there)
    assert validate(tmp_path / "back", sparsity=0.5)["violations"] == []
