"""One prediction of the twin of docs/spinn.md: dense, with zeros in place, packed in rows, with neurons removed.

    OMP_NUM_THREADS=1 python benchmarks/bench_spinn_latency.py

The network is that of turning wear (24 inputs, one output) with random weights, for time depends on sizes and zeros
alone. 70 % of the weights, or of the parameters as whole neurons, go. Times are medians over turns on one thread;
`difference` is the largest from the network with those neurons zeroed, over the largest output, in float64.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from torch import nn

from machine import machine, write_rows
from resu.experiments.spinn.latency import latencies, packed
from resu.experiments.spinn.neurons import widths
from resu.experiments.spinn.twin import dense_network
from resu.pruning.pruners import MagnitudePruner
from resu.pruning.structured.pruner import StructuredPruner


def networks(hidden: Sequence[int]) -> tuple[dict[str, nn.Sequential], float]:
    """The network, with zeros, and with neurons removed; and the difference that was found of the last."""
    torch.manual_seed(0)
    dense = dense_network(24, 1, hidden)
    sparse, small = deepcopy(dense), deepcopy(dense)
    MagnitudePruner(0.7, scope="global").prune(sparse)
    result = StructuredPruner(0.7, torch.randn(1, 24), target="parameters", round_to=4).prune(small)
    return {"dense": dense, "zeros in place": sparse, "neurons removed": small}, result.error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 512, 512, 256])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/spinn_latency.csv"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found, difference = networks(given.hidden)
    x = torch.randn(1, 24)
    calls = {name: partial(network, x) for name, network in found.items()}
    calls["packed in rows"] = partial(packed(found["zeros in place"]), x)
    with torch.no_grad():
        seconds = latencies(calls, given.rounds)
    found["packed in rows"] = found["zeros in place"]
    rows = [
        {
            "network": name,
            "widths": " ".join(map(str, widths(found[name]))),
            "parameters": sum(int(p.count_nonzero()) if p.ndim > 1 else p.numel() for p in found[name].parameters()),
            "microseconds": round(1e6 * time, 1),
            "ratio": round(time / seconds["dense"], 3),
            "difference": difference if name == "neurons removed" else "",
            "rounds": given.rounds,
            "load": round(os.getloadavg()[0], 1),
            **{key: machine()[key] for key in ("cpu", "flags", "torch")},
        }
        for name, time in seconds.items()
    ]
    write_rows(given.out, rows)
    for row in rows:
        print(f"{row['network']:<16} {row['parameters']:>7} parameters ({row['widths']}) {row['microseconds']:>7} µs")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
