import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from resu.core.io import FileFormatError
from resu.pruning.snapshots import (
    model_checksum,
    random_state,
    read_model,
    set_random_state,
    take_snapshot,
    write_model,
)


def _model(tied=True):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4).to(torch.bfloat16))
    if tied:
        model.append(nn.Linear(4, 4))
        model[3].weight = model[0].weight
    return model


def test_a_model_comes_back_bit_for_bit_and_in_place(tmp_path):
    model = _model()
    model[1](torch.randn(8, 4))  # moves its running mean
    write_model(model, tmp_path / "a.safetensors")
    sums, before = model_checksum(model), take_snapshot(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7)
        model[1].running_mean.fill_(3)
    assert model_checksum(model) != sums
    read_model(model, tmp_path / "a.safetensors", sums)
    assert model_checksum(model) == sums
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert model[3].weight is model[0].weight


def test_trap_41_shared_storage_is_stored_once(tmp_path):
    model = _model()
    write_model(model, tmp_path / "a.safetensors")
    assert "3.weight" not in load_file(tmp_path / "a.safetensors")
    view = nn.Module()
    whole = torch.randn(4, 4)
    view.a, view.b = nn.Parameter(whole[:2]), nn.Parameter(whole[1:])  # overlapping views
    write_model(view, tmp_path / "b.safetensors")
    read_model(view, tmp_path / "b.safetensors", model_checksum(view))


def test_damage_and_other_models_are_refused(tmp_path):
    model = _model()
    file = tmp_path / "a.safetensors"
    write_model(model, file)
    sums, before = model_checksum(model), model_checksum(model)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(FileFormatError, match="does not match its checksum"):
        read_model(model, file, sums)
    file.write_bytes(content[:-10])
    with pytest.raises(FileFormatError, match="cannot read"):
        read_model(model, file, sums)
    file.write_bytes(b"")
    with pytest.raises(FileFormatError, match="cannot read"):
        read_model(model, file, sums)
    with pytest.raises(FileNotFoundError):
        read_model(model, tmp_path / "b.safetensors", sums)
    write_model(nn.Linear(2, 2), tmp_path / "c.safetensors")
    with pytest.raises(FileFormatError, match="of another model"):
        read_model(model, tmp_path / "c.safetensors", sums)
    assert model_checksum(model) == before
    with pytest.raises(FileExistsError):
        write_model(model, file)


def test_what_is_no_tensor_is_refused(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(TypeError, match="_extra_state"):
        write_model(Odd(2, 2), tmp_path / "a.safetensors")


def test_random_states_come_back_through_json():
    import json

    state = json.loads(json.dumps(random_state()))
    drawn = random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist(), random.gauss(0, 1)
    set_random_state(state)
    assert drawn == (random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist(), random.gauss(0, 1))
