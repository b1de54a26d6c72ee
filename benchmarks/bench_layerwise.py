"""What calibration block by block takes in memory and processor time, beside all layers at once and a forward pass.

    python benchmarks/bench_layerwise.py

A Llama-shaped model with random weights; each way runs in a process of its own, for the peak of a process never falls.
``extra_mib`` is the peak resident memory above that of the model and one forward pass of one batch.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from machine import machine, write_rows

WAYS = ("forward", "hessians at once", "hessians by block", "wanda", "sparsegpt", "wanda owl", "magnitude")


def run(way: str, blocks: int, width: int, batches: int) -> dict[str, object]:
    """One way, in this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from resu.pruning.layerwise import Walk
    from resu.pruning.one_shot import prune_model
    from resu.pruning.statistics import collect
    from resu.pruning.targets import pruning_targets

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=8 * width // 3 // 16 * 16,
        num_hidden_layers=blocks,
        num_attention_heads=8,
    )
    model = LlamaForCausalLM(config).eval()
    data = [{"input_ids": torch.randint(0, 1000, (4, 128))} for _ in range(batches)]
    layers, _ = pruning_targets(model)
    with torch.no_grad():
        model(**data[0])
    before, start = _peak(), time.process_time()
    if way == "forward":
        with torch.no_grad():
            for batch in data:
                model(**batch)
    elif way == "hessians at once":
        collect(model, layers, data, {"hessian"})
    elif way == "hessians by block":
        with Walk(model, layers, data) as walk:
            walk.go({"hessian"}, lambda unit, inputs: None)
    else:
        method, _, distribution = way.partition(" ")
        prune_model(model, 0.5, method, distribution=distribution or None, calibration=data)
    return {
        "weights": sum(layer.weight.numel() for layer in layers.values()),
        "blocks": blocks,
        "width": width,
        "tokens": sum(batch["input_ids"].numel() for batch in data),
        "way": way,
        "extra_mib": round(_peak() - before, 1),
        "cpu_seconds": round(time.process_time() - start, 2),
        "cpu": machine()["cpu"],
        "torch": torch.__version__,
    }


def _peak() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 if sys.platform != "darwin" else 1024**2)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batches", type=int, default=8, help="of 4 texts of 128 tokens")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/layerwise.csv"))
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way is not None:
        print(json.dumps(run(options.way, options.blocks, options.width, options.batches)))
        return 0
    sizes = ["--blocks", str(options.blocks), "--width", str(options.width), "--batches", str(options.batches)]
    rows = []
    for way in WAYS:
        command = [sys.executable, __file__, *sizes, "--way", way]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append(json.loads(printed.splitlines()[-1]))
        print(f"{way:20} {rows[-1]['extra_mib']:8.1f} MiB {rows[-1]['cpu_seconds']:8.2f} s")
    write_rows(options.out, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
