"""Checkpoints: everything in, everything back, or a clear error and nothing changed."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from resu import load_checkpoint, save_checkpoint
from resu.core.mask import SparseMask
from resu.formats.tree import flatten, unflatten
from resu.modules.convert import convert_to_resu, get_resu_modules
from resu.training.algorithms import Magnitude
from resu.training.sparsifier import Sparsifier
from tests.formats.helpers import network, pruned, same_state

MODES = ["SPARSE", "RESU", "QRESU", "QRESU_SELECTIVE"]


@pytest.mark.parametrize("layout", ["dense", "bitmask"])
def test_model_masks_and_metadata_come_back(layout, tmp_path):
    model, masks = pruned()
    path = tmp_path / "m.safetensors"
    save_checkpoint(model, path, masks=masks, metadata={"epoch": 3}, layout=layout)
    other = network()
    found = load_checkpoint(path, other)
    assert same_state(model, other)
    assert found.masks == masks
    assert found.metadata == {"epoch": 3}
    assert set(found.state) == set(model.state_dict())
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_dense_files_are_plain_safetensors(tmp_path):
    model, masks = pruned()
    save_checkpoint(model, tmp_path / "m.safetensors", masks=masks)
    raw = load_file(tmp_path / "m.safetensors")
    assert torch.equal(raw["3.weight"], model[3].weight)
    assert {k for k in raw if not k.startswith("resu.")} == set(model.state_dict())
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"  # transformers wants it


def test_the_bitmask_layout_is_smaller_and_keeps_its_names(tmp_path):
    weight = torch.randn(256, 256)
    mask = SparseMask.from_magnitude(weight, 0.5)
    mask.apply_(weight)
    model = nn.Linear(256, 256, bias=False)
    with torch.no_grad():
        model.weight.copy_(weight)
    for layout in ("dense", "bitmask"):
        save_checkpoint(model, tmp_path / f"{layout}.safetensors", masks={"weight": mask}, layout=layout)
    sizes = [(tmp_path / f"{layout}.safetensors").stat().st_size for layout in ("dense", "bitmask")]
    assert sizes[1] < 0.6 * sizes[0]
    assert {"shape", "compressed", "bitmask", "row_offsets"} <= set(load_file(tmp_path / "bitmask.safetensors"))
    assert torch.equal(load_checkpoint(tmp_path / "bitmask.safetensors").state["weight"], weight)


def test_files_of_others_are_read(tmp_path):
    model, masks = pruned()
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    other = network()
    found = load_checkpoint(tmp_path / "plain.safetensors", other)
    assert same_state(model, other)
    assert (found.masks, found.metadata, found.extra) == ({}, {}, {})
    # An orphaned sparse-bitmask checkpoint: no header of ours.
    save_checkpoint(model, tmp_path / "m.safetensors", masks=masks, layout="bitmask")
    raw = {k: v for k, v in load_file(tmp_path / "m.safetensors").items() if not k.startswith("resu.")}
    save_file(raw, tmp_path / "orphan.safetensors")
    other = network()
    found = load_checkpoint(tmp_path / "orphan.safetensors", other)
    assert same_state(model, other)
    assert found.masks == masks


@pytest.mark.parametrize("mode", MODES)
def test_resurrection_layers_come_back_in_their_mode(mode, tmp_path):
    model = convert_to_resu(network())
    for layer in get_resu_modules(model).values():
        layer.prune_by_magnitude(0.5)
        if mode == "RESU":
            layer.enter_resu_mode()
        elif mode == "QRESU":
            layer.enter_qresu_mode(bits=4)
        elif mode == "QRESU_SELECTIVE":
            layer.enter_qresu_selective_mode(bits=8)
    masks = {f"{n}.weight": layer.mask for n, layer in get_resu_modules(model).items()}
    save_checkpoint(model, tmp_path / "m.safetensors", masks=masks)
    other = convert_to_resu(network())
    found = load_checkpoint(tmp_path / "m.safetensors", other)
    assert found.masks == masks
    assert {layer.mode.name for layer in get_resu_modules(other).values()} == {mode}
    assert same_state(model, other)
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(model.eval()(x), other.eval()(x))


def test_trap_41_ties_are_stored_once_and_stay_ties(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.head = nn.Embedding(50, 20), nn.Linear(20, 50, bias=False)
            self.head.weight = self.wte.weight

    model, other = Tied(), Tied()
    save_checkpoint(model, tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").stat().st_size < 1.5 * 50 * 20 * 4
    found = load_checkpoint(tmp_path / "m.safetensors", other)
    assert other.head.weight is other.wte.weight
    assert same_state(model, other)
    assert found.state["head.weight"] is found.state["wte.weight"]
    mask = SparseMask.from_magnitude(model.wte.weight, 0.5)
    mask.apply_(model.wte.weight)
    for layout in ("dense", "bitmask"):
        save_checkpoint(model, tmp_path / "m.safetensors", masks={"head.weight": mask}, overwrite=True, layout=layout)
        assert load_checkpoint(tmp_path / "m.safetensors", other).masks == {"head.weight": mask}
        assert same_state(model, other)


def test_trap_41_views_of_one_storage_are_saved_apart(tmp_path):
    base = torch.arange(12.0)
    state = {
        "a": base[:6],
        "b": base[3:9],
        "c": base.view(3, 4).t(),
        "empty": torch.empty(0, 3),
        "also": torch.empty(0),
    }
    save_checkpoint(state, tmp_path / "m.safetensors", extra={"x": {"again": base, "bits": base[:6]}})
    found = load_checkpoint(tmp_path / "m.safetensors")
    assert all(torch.equal(found.state[k], state[k]) for k in state)
    assert torch.equal(found.extra["x"]["again"], base)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn]
)
def test_every_dtype_comes_back(dtype, tmp_path):
    state = {"t": torch.tensor([[0.0, 1.0, 2.0]]).to(dtype), "scalar": torch.tensor(1).to(dtype)}
    save_checkpoint(state, tmp_path / "m.safetensors")
    found = load_checkpoint(tmp_path / "m.safetensors").state
    assert found["t"].dtype == dtype
    assert torch.equal(found["t"].view(torch.uint8), state["t"].view(torch.uint8))
    assert found["scalar"].shape == ()


@pytest.mark.parametrize("layout", ["dense", "bitmask"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8]
)
@given(shape=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_trap_03_every_bit_of_masked_weights_comes_back(layout, dtype, shape, seed, tmp_path_factory):
    path = tmp_path_factory.mktemp("c") / "m.safetensors"
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(shape, generator=generator) < 0.6
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    # Any bits: payloads of NaN, infinities, -0.0; and zeros that are kept.
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator).to(torch.uint8).view(word).view(shape)
    raw[~keep | (torch.rand(shape, generator=generator) < 0.2)] = 0
    save_checkpoint({"a.weight": raw.view(dtype)}, path, masks={"a.weight": keep}, layout=layout)
    found = load_checkpoint(path)
    assert found.state["a.weight"].dtype == dtype
    assert torch.equal(found.state["a.weight"].view(word), raw)
    assert found.masks == {"a.weight": SparseMask(keep)}


def test_trap_27_a_run_goes_on_from_one_file_bit_for_bit(tmp_path):
    def start():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        rule = Magnitude(sparsity=0.8, begin_step=0, end_step=8, interval=2)
        return model, optimizer, Sparsifier(model, optimizer, rule)

    def steps(model, optimizer, first, last):
        for i in range(first, last):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(i))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    model, optimizer, sparsifier = start()
    steps(model, optimizer, 0, 5)
    extra = {"optimizer": optimizer.state_dict(), "sparsifier": sparsifier.state_dict()}
    save_checkpoint(model, tmp_path / "m.safetensors", masks=sparsifier.masks, extra=extra)
    steps(model, optimizer, 5, 12)

    other, optimizer2, sparsifier2 = start()
    found = load_checkpoint(tmp_path / "m.safetensors", other)
    optimizer2.load_state_dict(found.extra["optimizer"])
    sparsifier2.load_state_dict(found.extra["sparsifier"])
    steps(other, optimizer2, 5, 12)
    assert same_state(model, other)
    assert sparsifier2.masks == sparsifier.masks


@pytest.mark.parametrize(
    "value",
    [None, True, 3, -2.5, 1e-300, "ü", [], {}, (), [1, (2, [3])], {"a": {1: (0.9, 0.999)}}, {"t": torch.ones(2)}],
)
def test_nested_states_come_back_with_their_types(value):
    tensors = {}
    text = json.dumps(flatten(value, tensors, "x"))
    assert repr(unflatten(json.loads(text), tensors)) == repr(value)


def test_what_needs_a_pickle_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"cannot store resu.extra.o.a.0 of type Linear"):
        save_checkpoint({}, tmp_path / "m.safetensors", extra={"o": {"a": [nn.Linear(1, 1)]}})
    with pytest.raises(TypeError, match="state 'a' is a int, not a tensor"):
        save_checkpoint({"a": 3}, tmp_path / "m.safetensors")
    with pytest.raises(TypeError, match="layout"):
        save_checkpoint({"a": torch.ones(2, 2).to_sparse()}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="meta device"):
        save_checkpoint(nn.Linear(2, 2, device="meta"), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="layout must be"):
        save_checkpoint({}, tmp_path / "m.safetensors", layout="csr")
    assert list(tmp_path.iterdir()) == []


def test_masks_that_do_not_describe_the_weights_are_refused(tmp_path):
    model, masks = pruned()
    dense = network()
    with pytest.raises(ValueError, match=r"'0.weight' is not zero at 18 positions its mask prunes"):
        save_checkpoint(dense, tmp_path / "m.safetensors", masks=masks)
    with pytest.raises(ValueError, match="belongs to no tensor"):
        save_checkpoint(model, tmp_path / "m.safetensors", masks={"9.weight": masks["0.weight"]})
    with pytest.raises(ValueError, match=r"mask '3.weight' has shape"):
        save_checkpoint(model, tmp_path / "m.safetensors", masks={"3.weight": masks["0.weight"]})
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_not_replaced_unasked(tmp_path):
    path = tmp_path / "m.safetensors"
    first, second = network(), network()
    save_checkpoint(first, path)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_checkpoint(second, path)
    assert torch.equal(load_checkpoint(path).state["3.weight"], first[3].weight)
    save_checkpoint(second, path, overwrite=True)
    assert torch.equal(load_checkpoint(path).state["3.weight"], second[3].weight)


@pytest.mark.parametrize("other", [nn.Linear(16, 6), nn.Sequential(nn.Conv2d(1, 4, 3)), nn.Sequential(nn.Linear(4, 4))])
def test_trap_39_a_file_that_does_not_fit_changes_nothing(other, tmp_path):
    save_checkpoint(network(), tmp_path / "m.safetensors")
    before = copy.deepcopy(other)
    with pytest.raises(ValueError, match="does not fit the model"):
        load_checkpoint(tmp_path / "m.safetensors", other)
    assert same_state(other, before)


def test_trap_39_part_of_a_fitting_state_is_not_loaded(tmp_path):
    save_checkpoint(network(), tmp_path / "m.safetensors")
    other = network()
    other[5] = nn.Linear(6, 4)
    before = copy.deepcopy(other)
    with pytest.raises(ValueError, match="does not fit the model"):
        load_checkpoint(tmp_path / "m.safetensors", other)
    assert same_state(other, before)


def test_trap_39_whatever_interrupts_the_loading_nothing_is_loaded(tmp_path):
    class Odd(nn.Linear):
        broken = False

        def get_extra_state(self):
            return {"calls": 1}

        def set_extra_state(self, state):
            if self.broken:
                self.broken = False
                raise KeyError("odd")

    def model():
        return nn.Sequential(nn.Linear(4, 4), Odd(4, 4))

    other = model()
    before = {k: v for k, v in copy.deepcopy(other).state_dict().items() if isinstance(v, torch.Tensor)}
    save_checkpoint({k: torch.zeros_like(v) for k, v in before.items()}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="does not fit the model"):  # the file has no extra state
        load_checkpoint(tmp_path / "m.safetensors", other)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in before.items())
    save_checkpoint(
        {**{k: torch.zeros_like(v) for k, v in before.items()}, "1._extra_state": torch.ones(1)},
        tmp_path / "n.safetensors",
    )
    other[1].broken = True
    with pytest.raises(KeyError, match="odd"):
        load_checkpoint(tmp_path / "n.safetensors", other)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in before.items())
