"""Smaller models on disk."""

import json

import pytest
import torch
from torch import nn

from resu.core.io import FileFormatError
from resu.pruning.structured.files import MANIFEST, load_shrunk, save_shrunk
from resu.pruning.structured.pruner import StructuredPruner


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 12, 3), nn.GroupNorm(3, 12)
        self.dw, self.size = nn.Conv2d(12, 12, 3, groups=12), 12 * 4
        self.fc, self.head = nn.Linear(48, 10), nn.Linear(10, 10, bias=False)
        self.head.weight = self.fc2 = nn.Parameter(torch.randn(10, 10))
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(10, 8))
        self.end = nn.Linear(8, 2)

    def forward(self, x):
        x = self.dw(self.norm(self.conv(x)).relu()).reshape(-1, self.size)
        return self.end(self.last(self.head(self.fc(x).relu())).relu())


def test_round_trip_after_two_removals(tmp_path):
    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 3, 6, 6)
    StructuredPruner(0.4, x).prune(model)
    result = StructuredPruner(0.5, x).prune(model)
    assert model.size < 48
    save_shrunk(model, tmp_path / "small", kept=result.slices)
    for source in (Net, Net()):
        again = load_shrunk(source, tmp_path / "small")
        assert torch.equal(again(x), model(x))
        assert again.head.weight is again.fc2
        assert repr(again) == repr(model)
        assert again.size == model.size
        again(x).sum().backward()
    with pytest.raises(FileExistsError):
        save_shrunk(model, tmp_path / "small")
    save_shrunk(model, tmp_path / "small", overwrite=True)
    kept = json.loads(json.loads((tmp_path / "small" / MANIFEST).read_text())["resu_shrunk"])["kept"]
    assert kept == {} or all(isinstance(v, dict) for v in kept.values())


def test_damage_and_other_models_are_refused(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    model = Net()
    StructuredPruner(0.4, x).prune(model)
    save_shrunk(model, tmp_path)
    with pytest.raises(FileFormatError, match="another model"):
        load_shrunk(nn.Linear(3, 3), tmp_path)
    fresh = Net()
    state = {k: v.clone() for k, v in fresh.state_dict().items()}
    weights = tmp_path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(FileFormatError, match="checksum"):
        load_shrunk(fresh, tmp_path)
    assert all(torch.equal(v, state[k]) for k, v in fresh.state_dict().items())
    assert fresh.size == 48
    manifest = tmp_path / MANIFEST
    manifest.write_text(manifest.read_text().replace("10", "11", 1))
    with pytest.raises(FileFormatError):
        load_shrunk(fresh, tmp_path)
    manifest.write_text("{")
    with pytest.raises(FileFormatError, match="JSON"):
        load_shrunk(fresh, tmp_path)
    manifest.unlink()
    with pytest.raises(FileNotFoundError):
        load_shrunk(fresh, tmp_path)


def test_compiled_models_are_saved_and_loaded_as_what_they_were_compiled_from(tmp_path):
    def make():
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    x = torch.randn(3, 4)
    model = torch.compile(make(), backend="eager")
    StructuredPruner(0.5, x).prune(model)
    save_shrunk(model, tmp_path)
    again, compiled = load_shrunk(make, tmp_path), torch.compile(make(), backend="eager")
    assert load_shrunk(compiled, tmp_path) is compiled
    for loaded in (again, compiled._orig_mod):
        assert torch.equal(loaded(x), model._orig_mod(x))
