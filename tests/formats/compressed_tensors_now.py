"""Runs in a process of its own, in which compressed-tensors of today can be imported.

python compressed_tensors_now.py weights SOURCE TARGET    packed weights -> what the library makes of them
python compressed_tensors_now.py models SOURCE TARGET     packed model folders -> outputs of transformers
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def weights(source, target):
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor as Compressor
    from compressed_tensors.quantization import QuantizationScheme

    for file in sorted(source.glob("*.safetensors")):
        scheme = QuantizationScheme(**json.loads(file.with_suffix(".json").read_text()))
        parts = load_file(file)
        found = Compressor.decompress(parts, scheme)
        again = Compressor.compress({"weight": found["weight"], "weight_scale": parts["weight_scale"]}, scheme)
        out = {"weight": found["weight"].contiguous(), "again": again["weight_packed"].contiguous()}
        save_file(out, target / file.name)


def models(source, target):
    import transformers
    from transformers import CompressedTensorsConfig

    transformers.logging.disable_progress_bar()
    for folder in sorted(p for p in source.iterdir() if p.is_dir()):
        kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
        ids = torch.arange(3, 27).view(2, 12)
        out = {}
        for dequantize in (False, True):
            config = CompressedTensorsConfig(dequantize=dequantize)
            model, info = kind.from_pretrained(folder, quantization_config=config, output_loading_info=True)
            assert not any(info.values()), info
            with torch.no_grad():
                out[f"dequantize={dequantize}"] = model(input_ids=ids)[0].contiguous()
        save_file(out, target / f"{folder.name}.safetensors")


if __name__ == "__main__":  # absent where tests are collected
    command, source, target = sys.argv[1:]
    {"weights": weights, "models": models}[command](Path(source), Path(target))
