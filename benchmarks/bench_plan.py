"""`resu plan` against what is measured: the peak of a training step, predicted without weights and then made.

    OMP_NUM_THREADS=1 python benchmarks/bench_plan.py --csv benchmarks/results/plan.csv

Each program is one of `resu.integrations.training_program`. Measured is what the allocator reports (`measure_memory`)
and the bits of masks, which NumPy makes and the allocator does not see.
"""

from __future__ import annotations

import argparse
import gc
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, GPT2Config, LlamaConfig

from machine import machine, write_rows
from resu.core.peak_memory import measure_memory
from resu.integrations.hf_plan import predict_step
from resu.integrations.training_program import Setup, training_program

# The sizes of all-MiniLM-L6-v2, of a Llama with 30 M weights, and of half of GPT-2.
CONFIGS: dict[str, Any] = {
    "minilm": BertConfig(
        vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
        architectures=["BertModel"],
    ),
    "llama30m": LlamaConfig(
        vocab_size=8192, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=1408,
        architectures=["LlamaForCausalLM"],
    ),
    "gpt2": GPT2Config(n_embd=384, n_layer=6, n_head=6, vocab_size=8192, bos_token_id=0, eos_token_id=0,
        architectures=["GPT2LMHeadModel"]),
}  # fmt: skip
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "MiniLM, full, AdamW": ("minilm", {"method": "full", "batch": 2, "length": 128}),
    "MiniLM, QRESU 4 bits, θ bf16": ("minilm", {"method": "qresu4", "batch": 2, "length": 128}),
    "MiniLM, QRESU 8 bits, in backward": ("minilm", {"method": "qresu8", "length": 128, "in_backward": True}),
    "Llama 30 M, RESU, checkpointing": ("llama30m", {"method": "resu", "length": 256, "checkpointing": True}),
    "Llama 30 M, LoRA": ("llama30m", {"method": "lora", "length": 256}),
    "Llama 30 M, LoRA on 4 bits": ("llama30m", {"method": "qlora", "length": 256}),
    "Llama 30 M, sparse LoRA (sparse_to_sparse)": ("llama30m", {"method": "sparse-lora", "length": 256}),
    "Llama 30 M, QRESU 4 bits, bf16, checkpointing": (
        "llama30m", {"method": "qresu4", "length": 256, "dtype": torch.bfloat16, "checkpointing": True},
    ),
    "Llama 30 M, full, bf16, in backward": (
        "llama30m", {"method": "full", "length": 256, "dtype": torch.bfloat16, "in_backward": True},
    ),
    "MiniLM, QRESU-Selective": ("minilm", {"method": "qresu-selective", "length": 128}),
    "GPT-2 (small), full, Adafactor": ("gpt2", {"method": "full", "length": 128, "optimizer": "adafactor"}),
}  # fmt: skip


def measured(config: Any, setup: Setup) -> int:
    """Peak bytes of two steps of the real program, from nothing."""
    gc.collect()
    with measure_memory() as built:
        model, step = training_program(config, setup)
    bits = sum(b.nbytes for name, b in model.named_buffers() if name.endswith("bitmask"))
    with measure_memory() as used:
        step()
        step()
    return built.current + bits + used.peak


def compare(name: str) -> dict[str, Any]:
    """One row: a program, its predicted and its measured peak."""
    key, options = RUNS[name]
    setup = Setup(**options)
    torch.manual_seed(0)
    predicted = predict_step(CONFIGS[key], setup).peak
    real = measured(CONFIGS[key], setup)
    return {
        "program": name,
        "batch": setup.batch,
        "length": setup.length,
        "dtype": str(setup.dtype).removeprefix("torch."),
        "optimizer": "none" if setup.method == "qresu-selective" else setup.optimizer,
        "predicted_bytes": predicted,
        "measured_bytes": real,
        "error_percent": round(100 * (predicted / real - 1), 2),
        **machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="programs by a part of their name")
    parser.add_argument("--csv", type=Path, default=None)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chosen = [n for n in RUNS if not given.only or any(part in n for part in given.only)]
    rows: list[dict[str, Any]] = []
    for name in chosen:
        rows.append(compare(name))
        print(*list(rows[-1].values())[:8], sep="\t", flush=True)
        if given.csv is not None:  # whole after each, so that an interrupt loses nothing
            write_rows(given.csv, rows)
    worst = max(rows, key=lambda row: abs(row["error_percent"]))
    print(f"largest error: {worst['error_percent']} % ({worst['program']})")


if __name__ == "__main__":
    main()
