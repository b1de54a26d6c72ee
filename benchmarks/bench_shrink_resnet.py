"""ResNets for CIFAR-10 with half of their multiply-adds: accuracy and latency, against torch-pruning.

    python benchmarks/bench_shrink_resnet.py --depths 20 56
    python benchmarks/bench_shrink_resnet.py --rivals FOLDER    # beside torch-pruning, installed there:
    pip install --no-deps --target FOLDER torch-pruning==1.6.1

Both tools take whole channels by the same importance (the L2 norm of a group) until at most the given share of
multiply-adds is left; then all smaller networks are fine-tuned on the same images in the same order. ``global`` lets
all channels compete, ``inside`` those inside of blocks only; ``blocks`` takes whole residual blocks, those without
which the loss on 256 training images is least, within the first half of the fine-tuning; ``blocks and channels`` takes
three tenths of the multiply-adds as blocks, the rest as channels. Latency is measured at the end for all networks of
one depth in turns, on this machine and with one thread; ratios are medians over turns. ``wrong`` is the largest
difference between the smaller network and the same one with what was removed zeroed, over the largest output, before
fine-tuning. torch-pruning has no such check; it takes the padding of these networks' shortcuts wrongly and fails, so it
gets to prune inside of the blocks only.

The images are JPEGs (quality 75) and the networks were trained on the originals: compare with each other.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from machine import machine
from resu.experiments.data.dataset import Images
from resu.experiments.data.folder import find_file, find_folder
from resu.experiments.data.sources import load
from resu.experiments.models import load_resnet
from resu.experiments.render import fill
from resu.experiments.rows import append, read
from resu.pruning.structured.block_pruner import BlockPruner
from resu.pruning.structured.pruner import StructuredPruner
from resu.pruning.structured.sizes import count_macs, count_parameters, latencies
from resu.pruning.structured.steps import GradualShrinker, shrink_iteratively

EXAMPLE = torch.zeros(1, 3, 32, 32)
BLOCKS = "resu, blocks"
WORDS = {
    "dense": "nothing",
    "resu": "channels, as many everywhere",
    "resu, global": "channels, all compete",
    "resu, inside": "channels inside of blocks",
    "resu, blocks and channels": "blocks and channels",
    BLOCKS: "blocks",
    "torch-pruning": "torch-pruning: channels inside of blocks",
}


@dataclass(frozen=True)
class Row:
    """One network of one tool; a line of the CSV."""

    depth: int
    tool: str
    macs: int
    parameters: int
    wrong: float
    before: float
    after: float
    steps: int
    seed: int
    images: int
    ms_1: float
    ratio_1: float
    ms_64: float
    ratio_64: float
    note: str
    cpu: str
    torch: str
    python: str


def ours(model: nn.Module, left: float, **options: Any) -> tuple[nn.Module, float]:
    """By this library."""
    result = StructuredPruner(1 - left, EXAMPLE, target="macs", **options).prune(model)
    return model, result.error


def block_pruner(left: float, data: Images) -> BlockPruner:
    """Whole blocks, scored by the loss on 256 training images."""
    places = next(iter(data.places(0, 256)))
    batch = data.take(places, torch.rand(len(places), 5, generator=torch.Generator().manual_seed(0)))
    return BlockPruner(
        1 - left, EXAMPLE, calibration=[batch], target="macs", loss_fn=lambda m, b: F.cross_entropy(m(b[0]), b[1])
    )


def mixed(model: nn.Module, left: float, data: Images) -> tuple[nn.Module, float]:
    """Blocks for three tenths of the multiply-adds, scored anew in four stages, then channels."""
    macs = float(count_macs(model, EXAMPLE))
    results = shrink_iteratively(model, block_pruner(0.7, data), 4)
    results.append(StructuredPruner(1 - left, EXAMPLE, target="macs", scope="global").prune(model, dense=macs))
    return model, max(result.error for result in results)


def theirs(model: nn.Module, left: float) -> tuple[nn.Module, float]:
    """By torch-pruning, its sparsity of channels found by bisection."""
    import torch_pruning as tp  # type: ignore[import-not-found]

    wanted, low, high = left * count_macs(model, EXAMPLE), 0.0, 1.0
    best: nn.Module | None = None
    for _ in range(12):
        middle = (low + high) / 2
        small = deepcopy(model)
        importance = tp.importance.GroupMagnitudeImportance(p=2)
        stay = [m for name, m in small.named_modules() if name in ("conv1", "linear") or name.endswith(".conv2")]
        pruner = tp.pruner.MagnitudePruner(small, EXAMPLE, importance, pruning_ratio=middle, ignored_layers=stay)
        pruner.step()
        if count_macs(small, EXAMPLE) <= wanted:
            best, high = small, middle
        else:
            low = middle
    if best is None:
        raise RuntimeError("no sparsity of channels is enough")
    return best, float("nan")


@torch.no_grad()
def accuracy(model: nn.Module, data: Images, images: int) -> float:
    """Percent of the test images that are classified as labelled; of fewer, hundreds taken evenly."""
    model.eval()
    right = seen = 0
    for x, y in data.evaluation("test", 100, (0, len(data.test) // images)):
        right, seen = right + int((model(x).argmax(1) == y).sum()), seen + len(y)
    return 100 * right / seen


def tune(
    model: nn.Module,
    data: Images,
    steps: int,
    batch: int,
    seed: int,
    tell: Callable[[str], None],
    pruner: BlockPruner | None = None,
) -> float:
    """SGD with momentum; the step size rises for a tenth, then falls to 0.

    With a pruner its share goes in the first half of the steps, in seven stages; the largest error of its checks.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    every = max(1, steps // 14)
    gradual = pruner and GradualShrinker(pruner, optimizer, end_step=7 * every, frequency=every)
    model.train()
    begin = time.monotonic()
    for step, places in enumerate(data.places(seed, batch)):
        if step == steps:
            break
        x, y = data.take(places, torch.rand(len(places), 5, generator=generator))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
        if gradual:
            gradual.step(model)
        if step % 10 == 9:
            tell(f"{step + 1}/{steps}, {(time.monotonic() - begin) / (step + 1) * (steps - step - 1):.0f} s left")
    tell("")
    return max(result.error for result in gradual.results) if gradual else 0.0


def tables(out: Path) -> dict[str, str]:
    """The table of a page, from the CSV."""
    lines = [
        "| ResNet | what went | multiply-adds | parameters | accuracy, % | time, 1 image | time, 64 images |",
        "|---" * 7 + "|",
    ]
    rows = read(out, Row)
    whole = {row.depth: row for row in rows if row.tool == "dense"}
    for row in rows:
        of = whole[row.depth]
        cells = [
            str(row.depth),
            WORDS[row.tool],
            f"{row.macs / of.macs:.2f}x",
            f"{row.parameters / of.parameters:.2f}x",
        ]
        cells += [f"{row.after:.1f}", f"{row.ratio_1:.2f}x", f"{row.ratio_64:.2f}x"]
        lines.append("| " + " | ".join(cells) + " |")
    return {"resnet": "\n".join(lines)}


def main() -> int:
    """Prune, tune, judge, time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="*", default=[20, 56], choices=(20, 32, 56))
    parser.add_argument("--left", type=float, default=0.5, help="share of the multiply-adds that stays")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    parser.add_argument("--tools", nargs="+", help="only these, and the dense network to time them beside")
    parser.add_argument("--rivals", type=Path, help="folder that torch-pruning is installed in")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/shrink_resnet.csv"))
    parser.add_argument("--page", type=Path, help="Markdown page to write the table into")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = load("cifar10")
    assert isinstance(data, Images)
    tools: dict[str, Callable[[nn.Module, float], tuple[nn.Module, float]]] = {
        "resu": ours,
        "resu, global": lambda model, left: ours(model, left, scope="global"),
        "resu, inside": lambda model, left: ours(model, left, scope="global", exclude=["conv1", "*.conv2"]),
        "resu, blocks and channels": lambda model, left: mixed(model, left, data),
        BLOCKS: lambda model, left: (model, 0.0),
    }
    if args.rivals is not None:
        sys.path.insert(0, str(args.rivals))
        tools["torch-pruning"] = theirs
    if args.tools:
        if unknown := [tool for tool in args.tools if tool not in tools]:
            parser.error(f"unknown tools {unknown}; known: {', '.join(tools)} (torch-pruning with --rivals)")
        tools = {tool: tools[tool] for tool in args.tools}
    about = {key: value for key, value in machine().items() if key in ("cpu", "torch", "python")}
    for depth in args.depths:
        weights = find_file(find_folder("model_resnet_cifar10"), [f"resnet{depth}.npz"])
        networks: dict[str, nn.Module] = {"dense": load_resnet(weights)}
        found: dict[str, dict[str, Any]] = {"dense": {"wrong": 0.0, "note": ""}}
        for tool, shrink in tools.items():
            try:
                networks[tool], wrong = shrink(load_resnet(weights), args.left)
                networks[tool](torch.randn(2, 3, 32, 32))
                found[tool] = {"wrong": wrong, "note": ""}
            except Exception as error:  # what another tool raises is part of the result
                networks.pop(tool, None)
                print(f"ResNet-{depth}: {tool} failed: {type(error).__name__}: {error}")
        for tool, network in networks.items():
            if args.tools and tool == "dense":
                continue
            found[tool]["before"] = accuracy(network, data, args.images)

            def tell(text: str, tool: str = tool, depth: int = depth) -> None:
                print(f"\rResNet-{depth}, {tool}: {text:<40}", end="" if text else "\n", flush=True)

            pruner = block_pruner(args.left, data) if tool == BLOCKS else None
            wrong = tune(network, data, args.steps, args.batch, args.seed, tell, pruner)
            found[tool]["wrong"] = max(wrong, found[tool]["wrong"])
            found[tool]["after"] = accuracy(network, data, args.images)
            print(f"{found[tool]['before']:.2f} % -> {found[tool]['after']:.2f} %", flush=True)
        times = {n: latencies(list(networks.values()), torch.randn(n, 3, 32, 32)) for n in (1, 64)}
        for index, (tool, network) in enumerate(networks.items()):
            if args.tools and tool == "dense":
                continue
            row = Row(
                depth=depth,
                tool=tool,
                macs=count_macs(network, EXAMPLE),
                parameters=count_parameters(network),
                steps=args.steps,
                seed=args.seed,
                images=args.images,
                **{f"ms_{n}": round(1e3 * t.seconds[index], 3) for n, t in times.items()},
                **{f"ratio_{n}": round(t.ratios[index], 3) for n, t in times.items()},
                **{key: round(v, 3) if key in ("before", "after") else v for key, v in found[tool].items()},
                **about,
            )
            append(args.out, row)
            print(
                f"ResNet-{depth} {tool:15} {row.macs / 1e6:6.1f} M multiply-adds {row.parameters / 1e3:6.0f} k "
                f"{row.before:6.2f} -> {row.after:6.2f} %  {row.ms_1:6.2f} ms ({row.ratio_1:.2f}), "
                f"batch 64 {row.ms_64:7.1f} ms ({row.ratio_64:.2f})"
            )
    if args.page is not None:
        fill(args.page, tables(args.out).get)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
