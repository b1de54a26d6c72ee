"""Will it fit? What a fine-tuning step needs by method, from sizes alone; then one is made and measured.

Run: python examples/plan_memory.py
"""

import torch
from transformers import LlamaConfig

from resu.core.peak_memory import measure_memory
from resu.integrations.hf_plan import predict_step
from resu.integrations.training_program import Setup, training_program

torch.set_num_threads(1)

config = LlamaConfig(
    vocab_size=1024, hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=4,
    architectures=["LlamaForCausalLM"],
)  # fmt: skip

# Followed without weights: it costs the same for a model that is larger than this machine.
for method in ("full", "sparse-lora", "resu", "qresu4"):
    found = predict_step(config, Setup(method=method, length=128))
    print(f"{method:12} weights {found.weights:>9,}  state {found.state:>9,}  peak {found.peak:>10,} bytes")

# Made for real, with gradients that are used up as they arrive.
setup = Setup(method="qresu4", length=128, in_backward=True)
with measure_memory() as built:
    model, step = training_program(config, setup)
with measure_memory() as used:
    step()
    step()
print(f"QRESU, updates in the backward pass: {predict_step(config, setup).peak:,} bytes planned")
print(f"                                     {built.current + used.peak:,} bytes measured")
