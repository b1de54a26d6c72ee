"""Pruning a checkpoint on disk at a global sparsity of 0.7: time, peak memory, and whether it is exact.

    python benchmarks/bench_streaming_prune.py
    python benchmarks/bench_streaming_prune.py --size 1 --folder /fast/disk

A checkpoint in shards of bf16 and fp32 in turn is generated, and pruned by ``resu`` and, where memory allows, by
``torch.nn.utils.prune.global_unstructured`` and ``torch.topk`` (which read all of it, prune, and write it again). Each
run is a process of its own; its peak memory is the largest resident set the system saw (``VmHWM``), torch's own
among it. ``copy`` reads and writes every file once with a flush to disk. Times are given as multiples of it, round by
round, with the range over rounds: where ``copy`` itself varies (a shared disk), the ratio says little, and one below 1
is noise, for pruning reads more than copying does. The source is flushed before the first run and the order rotates, so
that no run waits for another's bytes. On the small checkpoint the positions are compared with those of the ranking in
memory. Processes are limited to ``--limit`` GB, so that what does not fit fails and takes nothing down.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from machine import machine, write_rows

SPARSITY = 0.7
RUNS = ("copy", "resu", "resu, 2 threads", "global_unstructured", "torch.topk")


def generate(folder: Path, size: float, files: int) -> int:
    """A checkpoint of about ``size`` GB whose layers differ in scale; returns its number of weights."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    places, weights, layer, per_file = {}, 0, 0, size * 1e9 / files
    width = 4096 if size >= 2 else 1024
    for i in range(files):
        dtype = (torch.bfloat16, torch.float32)[i % 2]
        tensors: dict[str, torch.Tensor] = {}
        while sum(x.numel() for x in tensors.values()) * dtype.itemsize < 0.97 * per_file:
            kind, rows = (("q_proj", width), ("up_proj", 11 * width // 4))[layer % 2]
            scale = 0.02 * float(torch.rand((), generator=generator) + 0.5)
            draw = torch.randn(rows, width, generator=generator).mul_(scale)
            tensors[f"model.layers.{layer}.{kind}.weight"] = draw.to(dtype)
            layer += 1
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        weights += sum(x.numel() for x in tensors.values())
    index = {"metadata": {"total_size": int(size * 1e9)}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in folder.iterdir():  # else the first run, whichever it is, waits for these bytes too
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    return weights


# -- one run, in a process of its own ----------------------------------------------------------------------------


def copy(source: Path, out: Path) -> int:
    out.mkdir()
    buffer = memoryview(bytearray(1 << 22))
    for file in sorted(source.iterdir()):
        with open(file, "rb", buffering=0) as reading, open(out / file.name, "wb", buffering=0) as writing:
            while n := reading.readinto(buffer):
                writing.write(buffer[:n])
            os.fsync(writing.fileno())
    return 0


def streamed(source: Path, out: Path, workers: int) -> int:
    from resu.integrations.checkpoint import prune_checkpoint

    report = prune_checkpoint(source, out, SPARSITY, distribution="global", workers=workers)
    return sum(layer["kept"] for layer in report["layers"])


def load(source: Path) -> dict[str, dict[str, torch.Tensor]]:
    from safetensors.torch import load_file

    return {file.name: load_file(file) for file in sorted(source.glob("*.safetensors"))}


def save(shards: dict[str, dict[str, torch.Tensor]], out: Path) -> None:
    from safetensors.torch import save_file

    out.mkdir()
    for file, tensors in shards.items():
        save_file(tensors, out / file, metadata={"format": "pt"})
        with open(out / file, "rb") as written:
            os.fsync(written.fileno())


def global_unstructured(source: Path, out: Path) -> int:
    from torch import nn
    from torch.nn.utils import prune

    shards, modules = load(source), {}
    for tensors in shards.values():
        for name, tensor in tensors.items():
            modules[name] = nn.Module()
            modules[name].weight = nn.Parameter(tensor, requires_grad=False)
    layers = [(module, "weight") for module in modules.values()]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=SPARSITY)
    kept = 0
    for tensors in shards.values():
        for name in tensors:
            kept += int(torch.count_nonzero(modules[name].weight_mask))
            prune.remove(modules[name], "weight")
            tensors[name] = modules[name].weight.data
    save(shards, out)
    return kept


def topk(source: Path, out: Path) -> int:
    from resu.core.counting import keep_count

    shards = load(source)
    joined = torch.cat([x.abs().float().view(-1) for tensors in shards.values() for x in tensors.values()])
    keep = keep_count(joined.numel(), SPARSITY)
    mask = torch.zeros(joined.numel(), dtype=torch.bool)
    mask[torch.topk(joined, keep, sorted=False).indices] = True
    place = kept = 0
    for tensors in shards.values():
        for x in tensors.values():
            part = mask[place : place + x.numel()].view(x.shape)
            x.masked_fill_(~part, 0)
            place, kept = place + x.numel(), kept + int(part.sum())
    save(shards, out)
    return kept


def child(run: str, source: Path, out: Path, limit: float) -> None:
    """Run, and print what it took; imports are not timed."""
    import resource

    import safetensors.torch  # noqa: F401

    import resu.integrations.checkpoint  # noqa: F401

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit * 1e9), int(limit * 1e9)))
    calls = {
        "copy": lambda: copy(source, out),
        "resu": lambda: streamed(source, out, 1),
        "resu, 2 threads": lambda: streamed(source, out, 2),
        "global_unstructured": lambda: global_unstructured(source, out),
        "torch.topk": lambda: topk(source, out),
    }
    began = time.perf_counter()
    kept = calls[run]()
    seconds = time.perf_counter() - began
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "peak_mb": peak, "kept": kept}))


# -- all runs ------------------------------------------------------------------------------------------------------


def equal_positions(source: Path, out: Path) -> bool:
    """Whether what a run left is what the ranking in memory keeps, position by position."""
    from resu.core.counting import keep_count, top_k_mask

    before, after = load(source), load(out)
    names = [(file, name) for file, tensors in before.items() for name in tensors]
    if (source / "model.safetensors.index.json").exists():
        from resu.core.shards import Shards

        order = {name: i for i, name in enumerate(Shards.open(source).names)}
        names.sort(key=lambda pair: order[pair[1]])
    joined = torch.cat([before[f][n].abs().float().view(-1) for f, n in names])
    mask = top_k_mask(joined, keep_count(joined.numel(), SPARSITY))
    left = torch.cat([after[f][n].float().view(-1) for f, n in names])
    values = torch.cat([before[f][n].float().view(-1) for f, n in names])
    return torch.equal(left, torch.where(mask, values, torch.zeros(())))


def measure(
    folder: Path, size: float, files: int, rounds: int, limit: float, runs: list[str]
) -> list[dict[str, object]]:
    """Rows of one checkpoint."""
    from resu.core.counting import keep_count

    source = folder / "source"
    print(f"generating {size:g} GB …", file=sys.stderr)
    weights = generate(source, size, files)
    found: dict[str, list[dict[str, float]]] = {run: [] for run in runs}
    notes: dict[str, str] = {}
    same: dict[str, object] = {}
    for i in range(rounds):
        for run in runs[i % len(runs) :] + runs[: i % len(runs)]:  # nobody is always first
            if run in notes:
                continue
            out = folder / "out"
            command = [sys.executable, __file__, "--child", run, str(source), str(out), "--limit", str(limit)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["killed"])[-1]
                notes[run] = f"failed within {limit:g} GB: {last[:90]}"
            else:
                found[run].append(json.loads(done.stdout.splitlines()[-1]))
                if i == 0 and run != "copy" and size <= 0.5:
                    same[run] = equal_positions(source, out)
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            print(f"{size:g} GB, {run}: {found[run][-1] if run not in notes else notes[run]}", file=sys.stderr)
    shutil.rmtree(source)
    rows = []
    for run in runs:
        values = found[run]
        kept = int(values[0]["kept"]) if values else ""
        ratios = [v["seconds"] / c["seconds"] for v, c in zip(values, found["copy"], strict=False)]
        rows.append(
            {
                "size_gb": size,
                "weights": weights,
                "run": run,
                "seconds": round(statistics.median(v["seconds"] for v in values), 2) if values else "",
                "times_copy": round(statistics.median(ratios), 2) if ratios else "",
                "times_copy_range": f"{min(ratios):.2f}-{max(ratios):.2f}" if ratios else "",
                "peak_mb": round(max(v["peak_mb"] for v in values)) if values else "",
                "kept": kept if run != "copy" else "",
                "exact_count": kept == keep_count(weights, SPARSITY) if values and run != "copy" else "",
                "equal_positions": same.get(run, ""),
                "note": notes.get(run, ""),
                "rounds": len(values),
                "load": round(os.getloadavg()[0], 1),
                "cpu": f"{machine()['cpu']}, {os.cpu_count()} cores",
                "torch": torch.__version__,
            }
        )
    return rows


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=4.0, help="GB of the large checkpoint")
    parser.add_argument("--small", type=float, default=0.2, help="GB of the one whose positions are compared")
    parser.add_argument("--files", type=int, default=8, help="shards, of bf16 and fp32 in turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=12.0, help="GB a process may take")
    parser.add_argument("--folder", type=Path, default=None, help="where, with room for three times the size")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="which runs; copy is always one")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/streaming_prune.csv"))
    parser.add_argument("--child", nargs=3, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run, source, out = options.child
        child(run, Path(source), Path(out), options.limit)
        return 0
    runs = [run for run in RUNS if run == "copy" or run in options.only]
    rows = []
    for size in (options.small, options.size):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            rows += measure(Path(folder), size, options.files, options.rounds, options.limit, runs)
    write_rows(options.out, rows)
    for row in rows:
        print(
            f"{row['size_gb']:>4} GB  {row['run']:<20} {row['seconds']:>8} s  {row['times_copy']:>5} x copy  "
            f"{row['peak_mb']:>6} MB  exact {row['exact_count']!s:<5}  "
            f"equal {row['equal_positions']!s:<5} {row['note']}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
