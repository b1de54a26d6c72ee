"""A training step of sparse LoRA: time, and memory at its peak, against what one would run instead.

    python benchmarks/bench_sparse_lora.py --width 2048 --layers 4 --batch 128

The same pruned network (`layers` square linear layers with ReLU) is trained by each method in one process, one step
after the other in turn; the ratio is to PEFT's LoRA of the same round (to the first method without PEFT).
With one thread, time is that of the processor, which other programs lengthen little. `dense_weff` makes the masked
weight `M ⊙ (W + s·BA)` as a dense tensor and lets autograd do the rest, as the code of MaskLoRA's paper does. Peak is
what tensors of one step hold at once beyond what is held between steps.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from machine import machine, write_rows
from resu.core.peak_memory import measure_memory
from resu.experiments.render import fill
from resu.pruning.sparse_lora import SparseLoRAConfig, apply_sparse_lora, lora_parameters

WHAT = {
    "peft": "PEFT's LoRA on the pruned weights (a merge loses the zeros)",
    "sparse_to_dense": "two thin products",
    "sparse_to_sparse": "the masked weight tile by tile",
    "scale": "the scaled weight tile by tile",
    "sparse_to_sparse_4bit": "the same over a packed 4-bit base",
    "dense_weff": "the masked weight as a dense tensor, by autograd",
}


SHOWN = {
    "peft": "PEFT's LoRA",
    "sparse_to_dense": "`sparse_to_dense`",
    "sparse_to_sparse": "`sparse_to_sparse`",
    "scale": "`scale`",
    "sparse_to_sparse_4bit": "`sparse_to_sparse`, `base_bits=4`",
    "dense_weff": "dense W_eff",
}


class DenseEffective(nn.Module):
    """MaskLoRA as one would write it down."""

    def __init__(self, linear: nn.Linear, mask: Tensor, r: int, scale: float) -> None:
        super().__init__()
        self.weight, self.bias, self.scale = (
            linear.weight.requires_grad_(False),
            linear.bias.requires_grad_(False),
            scale,
        )
        self.register_buffer("mask", mask)
        self.a = nn.Parameter(torch.randn(r, linear.in_features) * linear.in_features**-0.5)
        self.b = nn.Parameter(torch.zeros(linear.out_features, r))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.mask * (self.scale * self.b @ self.a), self.bias)


def prepare(method: str, args: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A pruned model ready to train by ``method``, and its optimizer."""
    torch.manual_seed(0)
    layers = [nn.Linear(args.width, args.width) for _ in range(args.layers)]
    masks = [torch.rand(args.width, args.width) >= args.sparsity for _ in layers]
    for layer, mask in zip(layers, masks, strict=True):
        layer.weight.data.mul_(mask)
    if method == "dense_weff":
        layers = [DenseEffective(one, mask, args.rank, 2.0) for one, mask in zip(layers, masks, strict=True)]  # type: ignore[misc]
    model: nn.Module = nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())][:-1]).to(args.dtype)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if method == "peft":
        import peft

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings = peft.LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=names)
            model = peft.get_peft_model(model, settings)
    elif method != "dense_weff":
        mode = method.removesuffix("_4bit")
        bits = None if mode == method else 4
        config = SparseLoRAConfig(r=args.rank, alpha=2 * args.rank, dropout=0.0, sparsity_mode=mode, base_bits=bits)
        model = apply_sparse_lora(model, {f"{n}.weight": m for n, m in zip(names, masks, strict=True)}, config)
    return model, torch.optim.AdamW(lora_parameters(model), lr=1e-4, fused=True)


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor) -> None:
    """Forward, backward, update."""
    F.mse_loss(model(x), target).backward()
    optimizer.step()
    optimizer.zero_grad()


def held_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def tables(out: Path) -> dict[str, str]:
    """The table of a page, from the CSV: time by batch, memory at the smallest batch."""
    with out.open(newline="") as file:
        rows = {(row["method"], int(row["batch"])): row for row in csv.DictReader(file)}
    batches = sorted({batch for _, batch in rows})
    head = [f"batch {batches[0]}", *map(str, batches[1:]), "held, MiB", "a step's own, MiB"]
    lines = [f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for method in dict.fromkeys(method for method, _ in rows):
        figures = [f"{float(rows[method, batch]['ratio_median']):.2f}" for batch in batches]
        figures += [f"{float(rows[method, batches[0]][name]):.1f}" for name in ("held_mib", "peak_mib")]
        lines.append(f"| {SHOWN[method]} | {' | '.join(figures)} |")
    return {"steps": "\n".join(lines)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 128, 1024])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=list(WHAT), default=list(WHAT))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sparse_lora.csv")
    parser.add_argument("--page", type=Path, help="only write the table of OUT into this Markdown page")
    args = parser.parse_args(argv)
    if args.page is not None:
        fill(args.page, tables(args.out).get)
        return 0
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    methods = list(args.methods)
    try:
        importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        print("peft: skipped, PEFT is not installed (pip install peft)")
        methods = [m for m in methods if m != "peft"]
    ready = {method: prepare(method, args) for method in methods}
    rows: list[dict[str, Any]] = []
    for batch in args.batch:
        x = torch.randn(batch, args.width).to(args.dtype).requires_grad_()
        target = torch.randn(batch, args.width).to(args.dtype)
        seconds: dict[str, list[float]] = {method: [] for method in methods}
        for turn in range(args.rounds + 2):
            for method, (model, optimizer) in ready.items():
                x.grad = None
                start = clock()
                one_step(model, optimizer, x, target)
                if turn >= 2:  # the first two make optimizer state and fill caches
                    seconds[method].append(clock() - start)
        against = seconds[methods[0]]
        for method, (model, optimizer) in ready.items():
            x.grad = None
            with measure_memory() as used:
                one_step(model, optimizer, x, target)
            ratios = sorted(a / b for a, b in zip(seconds[method], against, strict=True))
            rows.append(
                {
                    "method": method,
                    "width": args.width,
                    "layers": args.layers,
                    "batch": batch,
                    "rank": args.rank,
                    "sparsity": args.sparsity,
                    "dtype": str(args.dtype).removeprefix("torch."),
                    "threads": args.threads,
                    "against": methods[0],
                    "ratio_median": round(statistics.median(ratios), 3),
                    "ratio_p25": round(ratios[len(ratios) // 4], 3),
                    "ms_median": round(1e3 * statistics.median(seconds[method]), 2),
                    "rounds": args.rounds,
                    "held_mib": round(held_bytes(model) / 2**20, 2),
                    "peak_mib": round(used.peak / 2**20, 2),
                    **machine(),
                }
            )
            row = rows[-1]
            print(
                f"batch {batch:5}  {method:22}{row['ratio_median']:7.2f}{row['ms_median']:9.1f} ms"
                f"{row['held_mib']:9.1f} MiB held{row['peak_mib']:9.1f} MiB peak   {WHAT[method]}",
                flush=True,
            )
    write_rows(args.out, rows)
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
