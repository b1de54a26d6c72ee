"""QRESU on a generated 1 B-parameter Llama: built block by block, trained for a few steps; what that took.

    OMP_NUM_THREADS=1 python benchmarks/bench_one_billion.py --csv benchmarks/results/one_billion.csv

The model is bfloat16 (hidden 2048, feed-forward 8192, 32 heads of which 8 hold keys and values, vocabulary 32000):
1.04 B weights in 16 layers. Blocks are made, pruned to 50 % and quantized to 4 bits one at a time, so the dense
model of 2.1 GB never exists. θ is bfloat16, activations are recomputed, gradients are used up in the backward pass.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from transformers import LlamaConfig

from machine import machine, write_rows
from resu.core.peak_memory import resident_memory
from resu.integrations.streamed_load import load_streamed, to_qresu
from resu.modules.convert import get_resu_modules, resurrection_parameters
from resu.training.update_in_backward import optimizer_in_backward

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path, default=None)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=given.hidden, intermediate_size=4 * given.hidden, num_hidden_layers=given.layers,
        num_attention_heads=given.hidden // 64, num_key_value_heads=max(1, given.hidden // 256),
        tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    before = (resident_memory(reset_peak=True) or (0, 0))[0]
    start = time.perf_counter()

    def told(done: int, of: int, name: str) -> None:
        now, most = resident_memory() or (0, 0)
        print(
            f"{name}: {time.perf_counter() - start:.0f} s, {now / GIB:.2f} GiB now, {most / GIB:.2f} GiB at most",
            flush=True,
        )

    model = load_streamed(
        config, to_qresu(0.5, bits=4, theta_dtype=torch.bfloat16), dtype=torch.bfloat16, progress=told
    )
    built = time.perf_counter() - start
    built_peak = (resident_memory() or (0, 0))[1]
    weights = sum(layer.weight_shape.numel() for layer in get_resu_modules(model).values())
    weights += sum(p.numel() for n, p in model.named_parameters() if not n.endswith("theta"))
    trained = resurrection_parameters(model)
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.norm.weight.requires_grad_(False)
    model.config.use_cache = False
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    optimizer = optimizer_in_backward(trained, lambda groups: torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.0))
    ids = torch.randint(32000, (1, given.length))
    resident_memory(reset_peak=True)
    seconds, losses = [], []
    for step in range(given.steps):
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
        _, most = resident_memory() or (0, 0)
        print(f"step {step + 1}: {seconds[-1]:.1f} s, loss {losses[-1]:.4f}, {most / GIB:.2f} GiB at most", flush=True)
    most = (resident_memory() or (0, 0))[1]
    row = {
        "weights": weights,
        "theta": sum(p.numel() for p in trained),
        "length": given.length,
        "build_seconds": round(built, 1),
        "build_peak_gib": round(built_peak / GIB, 3),
        "step_seconds": round(min(seconds), 1),
        "step_peak_gib": round(most / GIB, 3),
        "process_before_gib": round(before / GIB, 3),
        "dense_gib": round(2 * weights / GIB, 3),
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
        "threads": given.threads,
        **machine(),
    }
    for name, value in row.items():
        print(f"{name}: {value}")
    if given.csv is not None:
        write_rows(given.csv, [row])


if __name__ == "__main__":
    main()
