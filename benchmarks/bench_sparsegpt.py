"""What one layer costs to prune with a Hessian, against the plain Wanda mask and against a column loop without blocks.

    python benchmarks/bench_sparsegpt.py                          # 1024, 2048 and 4096 wide, one thread
    python benchmarks/bench_sparsegpt.py --device cuda --widths 4096 8192

Square layers, correlated inputs with a mean, half of the weights pruned. Within a round the ways of one width run one
after the other, and ratios are to Wanda's mask in the same round, for shared machines drift. The Hessian is given, as
it is for all that use one; what collecting it costs is the row ``hessian``. ``column loop`` is the update as the
paper's equations have it, U from two Cholesky factorisations and an inverse, each column's error spread over all later
columns at once. ``error`` is ``‖(W-Ŵ)X‖ / ‖WX‖`` over the calibration inputs.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from machine import machine, write_rows
from resu.core.pattern import NM, Unstructured
from resu.pruning.dsnot import dsnot
from resu.pruning.hessian import factorise
from resu.pruning.sparsegpt import reconstruct, sparsegpt


def inputs(width: int, tokens: int, device: str) -> Tensor:
    """Correlated inputs, some much larger than others, with a mean."""
    g = torch.Generator().manual_seed(width)
    mix = torch.randn(width, width // 4, generator=g).to(device) / (width // 4) ** 0.5
    x = torch.randn(tokens, width // 4, generator=g).to(device) @ mix.T
    x += 0.3 * torch.randn(tokens, width, generator=g).to(device)
    return (x + 0.3 * torch.randn(width, generator=g).to(device)) * torch.randn(width, generator=g).exp().to(device)


def by_inverse(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse: two factorisations and an inverse."""
    h = hessian.clone()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)


def column_loop(weight: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    """The update under a given mask, one column after the other."""
    u, w = by_inverse(hessian), weight.clone()
    for j in range(w.shape[1]):
        error = (w[:, j] / u[j, j]).masked_fill_(mask[:, j], 0)
        w[:, j + 1 :].addr_(error, u[j, j + 1 :], alpha=-1)
        w[:, j].masked_fill_(~mask[:, j], 0)
    return w


def ways(width: int, x: Tensor, naive_up_to: int) -> tuple[Tensor, Tensor, dict[str, Callable[[], Tensor | None]]]:
    """Weight, Hessian, and ``{name: run it}``; what runs gives the new weight, or nothing."""
    w = torch.randn(width, width, generator=torch.Generator().manual_seed(0)).to(x.device) / width**0.5
    h = 2 / len(x) * x.T @ x
    norm, mean = x.norm(dim=0), x.mean(dim=0)
    keep = width * width // 2
    mask = Unstructured("row").mask(w.abs() * norm, 0.5)
    paired = NM(2, 4).mask(w.abs() * norm, 0.5)
    options = {"input_mean": mean, "input_norm": norm}
    runs: dict[str, Callable[[], Tensor | None]] = {
        "wanda": lambda: w.where(Unstructured("row").mask(w.abs() * norm, 0.5), 0),
        "wanda 2:4": lambda: w.where(NM(2, 4).mask(w.abs() * norm, 0.5), 0),
        "wanda + dsnot": lambda: w.where(dsnot(w, mask, **options), 0),
        "wanda 2:4 + dsnot": lambda: w.where(dsnot(w, paired, pattern=NM(2, 4), **options), 0),
        "sparsegpt": lambda: sparsegpt(w, h, pattern=Unstructured(), keep=keep).weight,
        "sparsegpt row": lambda: sparsegpt(w, h, pattern=Unstructured("row"), keep=keep).weight,
        "sparsegpt 2:4": lambda: sparsegpt(w, h, pattern=NM(2, 4), keep=keep).weight,
        "wanda + reconstruct": lambda: reconstruct(w, h, mask).weight,
        "hessian": lambda: (x.T @ x, None)[1],
        "factor": lambda: (factorise(h), None)[1],
        "factor by inverse": lambda: (by_inverse(h), None)[1],
    }
    if width <= naive_up_to:
        runs["wanda + column loop"] = lambda: column_loop(w, h, mask)
    return w, h, runs


def measure(width: int, rounds: int, device: str, naive_up_to: int) -> list[dict[str, object]]:
    """Rows of one width."""
    w, h, runs = ways(width, inputs(width, 2 * width, device), naive_up_to)
    whole = float(((w @ h) * w).sum())
    times: dict[str, list[float]] = {name: [] for name in runs}
    errors: dict[str, float] = {}
    for number in range(rounds + 1):
        for name, run in runs.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            after = run()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - start)
            elif after is not None:
                change = after - w
                errors[name] = (float(((change @ h) * change).sum()) / whole) ** 0.5
        print(f"{width} wide, round {number} of {rounds}", file=sys.stderr)
    rows = []
    for name, seconds in times.items():
        ratios = sorted(a / b for a, b in zip(seconds, times["wanda"], strict=True))
        rows.append(
            {
                "way": name,
                "width": width,
                "seconds_median": round(statistics.median(seconds), 4),
                "ratio_p25": round(ratios[len(ratios) // 4], 2),
                "error": round(errors[name], 4) if name in errors else "",
                "rounds": rounds,
                "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
                "threads": torch.get_num_threads(),
                "cpu": machine()["cpu"],
                "torch": torch.__version__,
                "python": platform.python_version(),
            }
        )
    return rows


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--naive-up-to", type=int, default=2048, help="widest layer for the column loop")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sparsegpt.csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        row for width in options.widths for row in measure(width, options.rounds, options.device, options.naive_up_to)
    ]
    write_rows(options.out, rows)
    for row in rows:
        cost = f"{row['seconds_median']:>8} s {row['ratio_p25']:>8}x wanda"
        print(f"{row['width']:>5} {row['way']:<22} {cost}  {row['error']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
