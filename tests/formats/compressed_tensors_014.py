"""Runs in a process of its own, in which compressed-tensors 0.14 can be imported: writes and reads with that library.

python compressed_tensors_014.py write SOURCE TARGET    dense folders -> folders in each layout, through ModelCompressor
python compressed_tensors_014.py read SOURCE TARGET     folders in a sparse layout -> dense folders
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

if __name__ == "__main__":  # absent where tests are collected
    from compressed_tensors import __version__
    from compressed_tensors.compressors import BaseCompressor, ModelCompressor
    from compressed_tensors.config import SparsityCompressionConfig

    assert __version__.startswith("0.14."), __version__


class Net(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.fc = torch.nn.Linear(24, 10, dtype=dtype)
        self.head = torch.nn.Linear(12, 6, bias=False, dtype=dtype)


def write(source, target):
    for folder in sorted(source.iterdir()):
        state = load_file(folder / "model.safetensors")
        layout = "sparse-24-bitmask" if folder.name.startswith("24") else "sparse-bitmask"
        config = SparsityCompressionConfig.load_from_registry(layout, targets=["Linear"])
        out = target / folder.name
        out.mkdir(parents=True)
        if folder.name.startswith("any"):  # all that is called weight, whatever its shape
            compressor = BaseCompressor.load_from_registry(layout, config=config)
            save_file(compressor.compress(state), out / "model.safetensors")
            continue
        model = Net(next(iter(state.values())).dtype)
        compressor = ModelCompressor(sparsity_config=config)
        save_file(compressor.compress(model, state), out / "model.safetensors", metadata={"format": "pt"})
        (out / "config.json").write_text(json.dumps({"model_type": "net"}))
        compressor.update_config(str(out))


def read(source, target):
    for folder in sorted(source.iterdir()):
        out = target / folder.name
        out.mkdir(parents=True)
        config = json.loads((folder / "config.json").read_text())
        compressor = ModelCompressor.from_compression_config(config["quantization_config"])
        found = {name: tensor.contiguous() for name, tensor in compressor.sparsity_compressor.decompress(str(folder))}
        if set(found) == set(Net(torch.float32).state_dict()):
            model = Net(found["fc.weight"].dtype)
            assert sorted(compressor.get_missing_module_keys(model)) == ["fc.weight", "head.weight"]
            compressor.decompress(str(folder), model)  # the way a model takes when it is loaded
            assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in found.items())
        save_file(found, out / "model.safetensors")


if __name__ == "__main__":
    command, source, target = sys.argv[1:]
    shutil.rmtree(target, ignore_errors=True)
    {"write": write, "read": read}[command](Path(source), Path(target))
