"""One training step: time and memory of RESU, QRESU and Selective against what one would run instead.

    python benchmarks/bench_train_step.py --width 2048 --layers 4 --batch 128

The same network (`layers` square linear layers with ReLU) is trained by each method in one process, one step
after the other in turn, and each step is compared with the dense step of the same round: shared machines
drift, ratios within a round do not. All methods use fused AdamW, the fastest there is in torch;
with `--fused False`, torch's default on the CPU. SHiRA trains as many values as RESU does (the pruned share); LoRA has
its usual rank 16. Peak memory is that of some steps in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import gc
import importlib
import importlib.metadata
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from machine import machine
from resu import convert_to_resu, get_resu_modules, resurrection_parameters

METHODS = ("dense", "resu", "resu_decay", "qresu4", "qresu8", "qresu4_bf16", "selective4", "lora", "shira")
WHAT = {
    "dense": "dense fine-tuning, AdamW",
    "resu": "RESU, AdamW without weight decay",
    "resu_decay": "RESU, AdamW with weight decay 0.01 (active weights are put back)",
    "qresu4": "QRESU 4 bits, AdamW",
    "qresu8": "QRESU 8 bits, AdamW",
    "qresu4_bf16": "QRESU 4 bits, bf16 θ, AdamW",
    "selective4": "QRESU-Selective 4 bits (updates itself)",
    "lora": "PEFT LoRA, rank 16, AdamW",
    "shira": "PEFT SHiRA, as many trained values as pruned ones, AdamW",
}


def base_model(width: int, layers: int, device: str) -> nn.Sequential:
    """The dense network."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(width, width, bias=False, device=device), nn.ReLU()]
    return nn.Sequential(*parts)


def _adapted(model: nn.Module, kind: str, width: int, sparsity: float) -> nn.Module:
    import peft

    if kind == "lora":
        config: Any = peft.LoraConfig(r=16, lora_alpha=32, target_modules=r"\d+")
    else:  # SHiRA trains r (in + out) values of each layer
        config = peft.ShiraConfig(r=max(1, round(sparsity * width / 2)), target_modules=r"\d+")
    config.target_modules = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return peft.get_peft_model(model, config)


def prepare(method: str, args: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    """A model ready to train by ``method``, and its optimizer."""
    model: nn.Module = base_model(args.width, args.layers, args.device)
    decay = 0.0
    if method == "dense":
        parameters = list(model.parameters())
        decay = 0.01
    elif method in ("lora", "shira"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = _adapted(model, method, args.width, args.sparsity)
        parameters = [p for p in model.parameters() if p.requires_grad]
        decay = 0.01
    else:
        convert_to_resu(model)
        for layer in get_resu_modules(model).values():
            layer.prune_by_magnitude(args.sparsity)
            if method.startswith("resu"):
                layer.enter_resu_mode()
            elif method == "selective4":
                layer.enter_qresu_selective_mode(bits=4)
            else:
                theta = torch.bfloat16 if method.endswith("bf16") else None
                layer.enter_qresu_mode(bits=int(method[5]), theta_dtype=theta)
        parameters = resurrection_parameters(model)
        decay = 0.01 if method != "resu" else 0.0
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=decay, fused=args.fused) if parameters else None
    return model, optimizer


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer | None, x: Tensor, target: Tensor) -> None:
    """Forward, backward, update."""
    loss = nn.functional.mse_loss(model(x), target)
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    else:
        model.zero_grad()


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes of everything the model and the optimizer hold, by storage, wherever it hangs."""
    found: dict[int, int] = {}

    def visit(value: Any, depth: int = 0) -> None:
        if isinstance(value, Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item, depth + 1)
        elif isinstance(value, (list, tuple)) and depth < 6:
            for item in value:
                visit(item, depth + 1)

    for module in model.modules():
        visit({k: v for k, v in vars(module).items() if k != "_modules"})
    if optimizer is not None:
        visit(list(optimizer.state.values()))
    return sum(found.values())


def _batch(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(args.batch, args.width, generator=generator)
    return x.to(args.device).requires_grad_(), torch.randn(args.batch, args.width, generator=generator).to(args.device)


def _settle(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def time_methods(methods: list[str], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per step and round, all methods in turn."""
    ready = {method: prepare(method, args) for method in methods}
    x, target = _batch(args)
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for turn in range(args.rounds + 2):
        for method, (model, optimizer) in ready.items():
            x.grad = None
            _settle(args.device)
            start = time.perf_counter()
            one_step(model, optimizer, x, target)
            _settle(args.device)
            if turn >= 2:  # the first two make optimizer state and fill caches
                seconds[method].append(time.perf_counter() - start)
    return seconds


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


def peak(method: str, args: argparse.Namespace) -> dict[str, float]:
    """In this process: bytes held between steps, and the peak of some steps above a bare process."""
    if method in ("lora", "shira"):
        importlib.import_module("peft")  # its code is not the method's memory
    bare = _status("VmRSS")
    model, optimizer = prepare(method, args)
    x, target = _batch(args)
    one_step(model, optimizer, x, target)
    gc.collect()
    weights = args.layers * args.width**2
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        one_step(model, optimizer, x, target)
        top = float(torch.cuda.max_memory_allocated())
    else:
        ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        for _ in range(2):
            one_step(model, optimizer, x, target)
        top = float((_status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) - bare)
    x.grad = None
    return {"held": held_bytes(model, optimizer) / weights, "peak": top / 2**20}


def _peak_apart(method: str, argv: list[str]) -> dict[str, float]:
    command = [sys.executable, __file__, "--peak", method, *argv]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    held, top = output.split()[-2:]
    return {"held": float(held), "peak": float(top)}


def available(methods: list[str]) -> list[str]:
    """Drop what cannot run here, saying why."""
    try:
        importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        for method in [m for m in methods if m in ("lora", "shira")]:
            print(f"{method}: skipped, PEFT is not installed (pip install peft)")
        return [m for m in methods if m not in ("lora", "shira")]
    return methods


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fused", type=lambda v: v == "True", default=True, help="fused AdamW (True or False)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "train_step.csv")
    parser.add_argument("--append", action="store_true", help="add to the file instead of replacing it")
    parser.add_argument("--peak", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.peak:
        result = peak(args.peak, args)
        print(result["held"], result["peak"])
        return 0

    methods = available(args.methods)
    if "dense" not in methods:
        methods.insert(0, "dense")
    seconds = time_methods(methods, args)
    gc.collect()
    same = [f"--{k}={getattr(args, k)}" for k in ("width", "layers", "batch", "sparsity", "threads", "device", "fused")]
    rows = []
    print(f"{'method':14}{'ratio':>8}{'p25':>8}{'ms':>9}{'B/weight':>10}{'peak MiB':>10}   what")
    for method in methods:
        ratios = sorted(a / b for a, b in zip(seconds[method], seconds["dense"], strict=True))
        row: dict[str, Any] = {
            "method": method,
            "width": args.width,
            "layers": args.layers,
            "batch": args.batch,
            "sparsity": args.sparsity,
            "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(),
            "threads": args.threads,
            "fused_adamw": args.fused,
            "ratio_median": round(statistics.median(ratios), 3),
            "ratio_p25": round(ratios[len(ratios) // 4], 3),
            "ms_median": round(1e3 * statistics.median(seconds[method]), 2),
            "rounds": args.rounds,
        }
        memory = _peak_apart(method, same)
        row["held_bytes_per_weight"] = round(memory["held"], 3)
        row["peak_mib"] = round(memory["peak"], 1)
        rows.append({**row, **machine()})
        print(
            f"{method:14}{row['ratio_median']:8.2f}{row['ratio_p25']:8.2f}{row['ms_median']:9.1f}"
            f"{row['held_bytes_per_weight']:10.2f}{row['peak_mib']:10.1f}   {WHAT[method]}",
            flush=True,
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    mode: Callable[..., Any] = args.out.open
    new = not (args.append and args.out.exists())
    with mode("w" if new else "a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
