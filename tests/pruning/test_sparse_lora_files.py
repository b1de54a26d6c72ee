"""An adapter in a file: the same in a fresh model, and damage is found before anything changes."""

import pytest
import torch

from resu.core.io import FileFormatError
from resu.pruning.sparse_lora import (
    apply_sparse_lora,
    get_lora_layers,
    load_adapter,
    lora_parameters,
    merge_all_lora_weights,
    save_adapter,
    set_adapters,
)
from tests.pruning.lora_models import MODES, adapted, batch, config, learn, network, same_bits


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("mode", MODES)
def test_the_same_in_a_fresh_model(mode, bits, tmp_path):
    model, _ = adapted(mode, base_bits=bits, train_norms=True)
    optimizer = torch.optim.Adam(lora_parameters(model), lr=0.01)
    model(batch()).square().sum().backward()
    optimizer.step()
    model.eval()
    expected = model(batch())
    path = tmp_path / "adapter.safetensors"
    save_adapter(model, path)
    fresh = load_adapter(network(), path).eval()
    assert torch.equal(fresh(batch()), expected)
    merge_all_lora_weights(model, preserve_sparsity=False)
    save_adapter(model, path, overwrite=True)  # of a merged model: the same adapter
    again = load_adapter(fresh, path, "again")
    assert torch.equal(again(batch()), expected)
    set_adapters(again, ["default", "again"])
    assert list(get_lora_layers(again)["3.weight"].configs) == ["default", "again"]


def test_never_overwritten_unasked(tmp_path):
    model, _ = adapted()
    path = tmp_path / "adapter.safetensors"
    save_adapter(model, path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        save_adapter(learn(model, seed=3), path)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="no adapter 'b'"):
        save_adapter(model, tmp_path / "b.safetensors", "b")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.safetensors"]


@pytest.mark.parametrize("place", [0.3, 0.6, 0.99])
def test_a_flipped_bit_is_found(place, tmp_path):
    model, _ = adapted()
    path = tmp_path / "adapter.safetensors"
    save_adapter(model, path)
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[header + int(place * (len(data) - header - 1))] ^= 4
    path.write_bytes(data)
    plain = network()
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    with pytest.raises(FileFormatError, match="checksum"):
        load_adapter(plain, path)
    assert same_bits(dict(plain.state_dict()), before)
    assert not get_lora_layers(plain)


def test_what_is_no_adapter(tmp_path):
    model, _ = adapted()
    path = tmp_path / "adapter.safetensors"
    with pytest.raises(FileNotFoundError):
        load_adapter(network(), path)
    save_adapter(model, path)
    whole = path.read_bytes()
    for data in (b"", whole[:-5], whole[:20], b"hello"):
        path.write_bytes(data)
        with pytest.raises(FileFormatError, match="cannot read"):
            load_adapter(network(), path)
    from resu.core.mask import SparseMask
    from resu.core.mask_files import write_masks

    write_masks({"w": SparseMask(torch.ones(2, 2, dtype=torch.bool))}, tmp_path / "masks.safetensors")
    with pytest.raises(FileFormatError, match="no resu_sparse_lora header"):
        load_adapter(network(), tmp_path / "masks.safetensors")


def test_another_model_is_refused(tmp_path):
    model, _ = adapted()
    path = tmp_path / "adapter.safetensors"
    save_adapter(model, path)
    with pytest.raises(ValueError, match=r"no parameter '0\.weight'"):
        load_adapter(torch.nn.Linear(3, 3), path)
    other = apply_sparse_lora(network(), None, config())
    with pytest.raises(ValueError, match="another mask already"):
        load_adapter(other, path, "b")
