"""A pruned model in the forms that other programs load: four bits, bitmask, Cerebras, ONNX.

Run: python examples/export.py
"""

import importlib.util
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from resu.formats.stored import Stored
from resu.integrations.cerebras import write_cerebras
from resu.integrations.checkpoint import prune_checkpoint
from resu.integrations.convert import convert
from resu.integrations.quantize import write_pack_quantized

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).bfloat16().save_pretrained("dense")
prune_checkpoint("dense", "pruned", 0.5)

# The layout that vLLM reads: 4-bit codes, pruned weights exactly 0.
report = write_pack_quantized("pruned", "four_bits", group_size=32)
print(f"pack-quantized: {report['bytes_before']} → {report['bytes_after']} bytes, {report['bits']:.2f} bits a weight")
print(f"  error of a layer: {report['error']['mean']:.3f} of its norm; dense stay {report['ignored']}")

# Back again: plain weights, each one of 16 values of its group.
convert("four_bits", "rounded", "dense")
before, after = Stored.open("pruned"), Stored.open("rounded")
name = "model.layers.0.mlp.up_proj.weight"
weight, rounded = before.read(name)[0], after.read(name)[0]
print("  pruned weights stay 0:", bool((rounded[weight == 0] == 0).all()))

report = convert("pruned", "bitmask", "bitmask")
print(f"bitmask: {report['bytes_before']} → {report['bytes_after']} bytes, nothing is rounded")

report = write_cerebras("pruned", "cerebras")
print(f"cerebras: masks as zeros, {report['kept_zeros']} kept weights were 0")
print(Path("cerebras/sparsity.yaml").read_text())

if all(importlib.util.find_spec(package) for package in ("onnx", "onnxscript", "onnxruntime")):
    from resu.integrations.hf_onnx import write_onnx

    report = write_onnx("pruned", "onnx")
    print(f"onnx: outputs differ by {report['error']:.1e} where the largest is {report['largest']:.2f}")
else:
    print("onnx: skipped; pip install onnx onnxscript onnxruntime")
