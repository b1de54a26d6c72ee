"""A training step of the PEFT methods: time, memory held, memory at its peak, bytes of an adapter file.

    python benchmarks/bench_peft.py --width 2048 --layers 4 --batch 128

The same network (`layers` square linear layers with ReLU) is trained by each method, through PEFT, in one process, one
step after the other in turn; the ratio is to PEFT's LoRA of the same round. SHiRA, Super-Tuning, RESU and QRESU train
the same number of values. Held is what model and optimizer hold between steps; peak is what tensors of one step hold
at once beyond it.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from machine import machine, write_rows
from resu.core.peak_memory import measure_memory
from resu.experiments.render import fill
from resu.integrations.peft import QRESUAdapterConfig, RESUAdapterConfig, SparseLoRAAdapterConfig

METHODS = ("lora", "shira", "supertuning", "sparse_lora", "resu", "qresu8", "qresu4")
WORDS = dict(
    zip(
        METHODS, ("LoRA", "SHiRA", "Super-Tuning", "sparse LoRA", "RESU", "QRESU, 8 bits", "QRESU, 4 bits"), strict=True
    )
)


def config(method: str, targets: list[str], masks: dict[str, Tensor], args: argparse.Namespace) -> peft.PeftConfig:
    """The configuration of one method."""
    if method == "lora":
        return peft.LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=targets)
    if method == "shira":
        return peft.ShiraConfig(r=max(1, round(args.sparsity * args.width / 2)), target_modules=targets)
    if method == "supertuning":
        # Its sparsity is the share that does not train.
        return peft.SupertuningConfig(sparsity=1 - args.sparsity, target_modules=targets)
    if method == "sparse_lora":
        return SparseLoRAAdapterConfig(r=args.rank, dropout=0.0, masks=masks, target_modules=targets)
    if method == "resu":
        return RESUAdapterConfig(sparsity=args.sparsity, target_modules=targets)
    return QRESUAdapterConfig(sparsity=args.sparsity, bits=int(method[-1]), target_modules=targets)


def prepare(method: str, args: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model ready to train by ``method``, and its optimizer."""
    torch.manual_seed(0)
    layers = [nn.Linear(args.width, args.width, dtype=args.dtype) for _ in range(args.layers)]
    model: nn.Module = nn.Sequential(*[module for layer in layers for module in (layer, nn.ReLU())][:-1])
    targets = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    masks = {name: torch.rand(args.width, args.width) >= 0.5 for name in targets}
    if method == "sparse_lora":
        for name, mask in masks.items():
            model.get_submodule(name).weight.data.mul_(mask)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, config(method, targets, masks, args))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-4)


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor) -> None:
    """Forward, backward, update."""
    F.mse_loss(model(x), target).backward()
    optimizer.step()
    optimizer.zero_grad()


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, buffers, indices that SHiRA keeps beside them, and optimizer state, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [index for module in model.modules() for index in getattr(module, "shira_indices", {}).values()]
    tensors += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def file_bytes(model: Any) -> int:
    """Bytes of the adapter file."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def tables(out: Path) -> dict[str, str]:
    """The table of a page, from the CSV: memory at batch 128."""
    with out.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["batch"] == "128"]
    lines = ["| method | trained values | held, MiB | peak, MiB | adapter file, MiB |", "|---|---:|---:|---:|---:|"]
    for row in sorted(rows, key=lambda row: METHODS.index(row["method"])):
        figures = " | ".join(f"{float(row[name]):.1f}" for name in ("held_mib", "peak_mib", "file_mib"))
        lines.append(f"| {WORDS[row['method']]} | {int(row['trained']):_} | {figures} |".replace("_", " "))
    return {"memory": "\n".join(lines)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 128, 1024])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sparsity", type=float, default=0.1, help="share of the weights that RESU and QRESU train")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "peft.csv")
    parser.add_argument("--page", type=Path, help="only write the table of OUT into this Markdown page")
    args = parser.parse_args(argv)
    if args.page is not None:
        fill(args.page, tables(args.out).get)
        return 0
    torch.set_num_threads(args.threads)
    ready = {method: prepare(method, args) for method in args.methods}
    rows: list[dict[str, Any]] = []
    for batch in args.batch:
        x, target = (torch.randn(batch, args.width, dtype=args.dtype) for _ in range(2))
        x.requires_grad_()
        seconds: dict[str, list[float]] = {method: [] for method in ready}
        for turn in range(args.rounds + 2):
            for method, (model, optimizer) in ready.items():
                x.grad = None
                start = time.perf_counter()
                one_step(model, optimizer, x, target)
                if turn >= 2:  # the first two make optimizer state and fill caches
                    seconds[method].append(time.perf_counter() - start)
        against = seconds[args.methods[0]]
        for method, (model, optimizer) in ready.items():
            x.grad = None
            with measure_memory() as used:
                one_step(model, optimizer, x, target)
            ratios = [a / b for a, b in zip(seconds[method], against, strict=True)]
            row = {
                "method": method,
                "width": args.width,
                "layers": args.layers,
                "batch": batch,
                "rank": args.rank,
                "sparsity": args.sparsity,
                "dtype": str(args.dtype).removeprefix("torch."),
                "threads": args.threads,
                "against": args.methods[0],
                "ratio_median": round(statistics.median(ratios), 3),
                "ms_median": round(1e3 * statistics.median(seconds[method]), 2),
                "rounds": args.rounds,
                "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "held_mib": round(held_bytes(model, optimizer) / 2**20, 2),
                "peak_mib": round(used.peak / 2**20, 2),
                "file_mib": round(file_bytes(model) / 2**20, 2),
                "peft": version("peft"),
                **machine(),
            }
            rows.append(row)
            print(
                f"batch {batch:5}  {method:12}{row['trained']:10} values{row['ratio_median']:7.2f}"
                f"{row['ms_median']:9.1f} ms{row['held_mib']:9.1f} MiB held{row['peak_mib']:9.1f} MiB peak"
                f"{row['file_mib']:9.1f} MiB on disk",
                flush=True,
            )
    write_rows(args.out, rows)
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
