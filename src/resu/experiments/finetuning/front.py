"""Rows of fine-tuned models to a table, a plot and the front: what no other way beats in both accuracy and memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from resu.experiments.finetuning.run import Row
from resu.experiments.finetuning.ways import KINDS, Way
from resu.experiments.plots import COLOURS, MARKERS, legend_below, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["OURS", "Point", "draw_front", "front", "guide", "page", "points", "rate", "table"]

#: Kinds whose method is resurrection.
OURS = ("resu", "qresu8", "qresu4", "selective")
TITLES = {"sst2": "SST-2 sentences", "trec": "TREC questions", "stories": "stories260K on tinyshakespeare"}

_GUIDE = {
    Way("full"): "full fine-tuning",
    Way("lora", 8): "LoRA, rank 8",
    Way("qlora", 2): "LoRA over 4 bits, rank 2",
    Way("super", 0.1): "Super-Tuning, 10 %",
    Way("shira", 32): "SHiRA, rank 32",
    Way("slora-sparse", 0.1): "sparse LoRA, rank 8, sparsity 0.1",
    Way("resu", 0.1): "RESU, sparsity 0.1",
    Way("qresu8", 0.5): "QRESU 8 bits, 0.5",
    **{Way("qresu4", sparsity): f"QRESU 4 bits, {sparsity}" for sparsity in (0.1, 0.5, 0.9)},
    Way("selective", 0.5): "Selective 4 bits, 0.5",
}


@dataclass(frozen=True)
class Point:
    """One way on one task, over seeds.

    Attributes:
        task: Name of the task.
        way: The way.
        metric: ``"accuracy"`` or ``"loss"``.
        values: One per seed.
        trained: Values that train.
        state: Bytes held between steps.
        peak: Bytes at the peak of a step.
        lean: The same with gradient checkpointing and updates in the backward pass.
    """

    task: str
    way: Way
    metric: str
    values: tuple[float, ...]
    trained: int
    state: int
    peak: int
    lean: int

    @property
    def mean(self) -> float:
        """Over seeds."""
        return fmean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 for a single one."""
        return stdev(self.values) if len(self.values) > 1 else 0.0


def points(rows: Iterable[Row]) -> list[Point]:
    """Rows of the test part, by task and way, with the memory of the part ``"memory"``, or else of one of the seeds."""
    groups: dict[tuple[str, str, float], list[Row]] = {}
    weighed: dict[tuple[str, str, float], Row] = {}
    for row in rows:
        if row.part == "test":
            groups.setdefault((row.task, row.kind, row.size), []).append(row)
        elif row.part == "memory":
            weighed[row.task, row.kind, row.size] = row
    found = []
    for key, some in groups.items():
        task, kind, size = key
        held = [weighed[key]] if key in weighed else some
        found.append(
            Point(
                task,
                Way(kind, size),
                some[0].metric,
                tuple(row.value for row in sorted(some, key=lambda row: row.seed)),
                some[0].trained,
                max(row.state_bytes for row in held),
                max(row.peak_bytes for row in held),
                max(row.lean_bytes for row in held),
            )
        )
    return found


def front(found: Sequence[Point], memory: str = "lean") -> list[Point]:
    """The points of one task that no other beats: none is as good or better in less or equal memory.

    Args:
        found: Points of one task.
        memory: Which of ``"state"``, ``"peak"`` and ``"lean"`` counts.

    Returns:
        By rising memory.
    """
    best: list[Point] = []
    for point in sorted(found, key=lambda p: (getattr(p, memory), _badness(p))):
        if not best or _badness(point) < _badness(best[-1]):
            best.append(point)
    return best


def _badness(point: Point) -> float:
    return -point.mean if point.metric == "accuracy" else point.mean


def rate(rows: Iterable[Row], task: str, way: Way) -> float | None:
    """The learning rate that was best on held-out data at this size, or on average over all sizes of this kind.

    The average keeps a size in between from a rate that only one of the ends bears. Where the task was not tuned, what
    was found on the first that was counts. None: nothing was tried.
    """
    dev = [row for row in rows if row.part == "dev"]
    kinds = (way.kind, KINDS[way.kind].like)
    tried = next((some for kind in kinds if (some := [row for row in dev if row.kind == kind])), [])
    tried = [row for row in tried if row.task == task] or [row for row in tried if row.task == tried[0].task]
    tried = [row for row in tried if row.size == way.size] or tried
    values: dict[float, list[float]] = {}
    for row in tried:
        values.setdefault(row.lr, []).append(row.value if row.metric == "accuracy" else -row.value)
    return max(values, key=lambda lr: fmean(values[lr])) if values else None


def table(found: Sequence[Point]) -> str:
    """Points of one task as a Markdown table, by memory at the peak of a lean step; the front in bold."""
    if not found:
        return ""
    first = {id(point) for point in front(found)}
    unit = "accuracy, %" if found[0].metric == "accuracy" else "loss"
    lines = [
        f"| way | trained | state, MB | peak, MB | lean peak, MB | {unit} |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    digits = 1 if found[0].metric == "accuracy" else 3
    for point in sorted(found, key=lambda p: (p.lean, p.way.label)):
        value = f"{point.mean:.{digits}f} ± {point.spread:.{digits}f}"
        cells = [point.way.label, f"{point.trained:,}".replace(",", " ")]
        cells += [f"{size / 1e6:.1f}" for size in (point.state, point.peak, point.lean)] + [value]
        bold = id(point) in first
        lines.append("| " + " | ".join(f"**{cell}**" if bold else cell for cell in cells) + " |")
    return "\n".join(lines)


def page(rows: Sequence[Row]) -> str:
    """The Markdown page of all tasks: how it was made, the plot, a table per task."""
    found = points(rows)
    parts = [
        "# Accuracy against memory: fine-tuning measured\n\n"
        "`python -m resu.experiments.finetuning` writes this page. Each row is one way to fine-tune: *trained* values; "
        "*state*, what is held between steps (weights, codes, masks, θ, adapters, optimizer state); *peak*, the most "
        "that is held in a step on the largest batch; *lean peak*, the same with gradient checkpointing and updates in "
        "the backward pass; quality on the test part, mean ± standard deviation over seeds. **Bold**: no other way is "
        "as good in as little lean peak. Rates were chosen on held-out data. What ways mean: {doc}`finetune`.\n\n"
        "![Quality against memory](finetuning_front.png)\n"
    ]
    for name in dict.fromkeys(point.task for point in found):
        test = [row for row in rows if row.task == name and row.part == "test"]
        weighed = [row for row in rows if row.task == name and (row.part == "memory" or row.state_bytes)]
        steps = ", ".join(str(n) for n in sorted({row.steps for row in test}))
        parts.append(
            f"## {TITLES[name]}\n\n{len(test)} runs of {steps} steps, on {_devices(test)}; memory measured on "
            f"{_devices([row for row in weighed if row.part == 'memory'] or weighed)}.\n\n"
            f"{table([point for point in found if point.task == name])}\n"
        )
    return "\n".join(parts)


def guide(rows: Sequence[Row]) -> str:
    """The table of the guide: some ways on all tasks, memory of MiniLM on TREC, time over that of full on SST-2."""
    found = {(point.task, point.way): point for point in points(rows)}

    def seconds(way: Way) -> float:
        return fmean(
            row.seconds
            for row in rows
            if (row.task, row.part, row.kind, row.size) == ("sst2", "test", way.kind, way.size)
        )

    lines = [
        "| | held between steps, MB | peak of a lean step, MB | TREC, % | SST-2, % | stories260K, loss "
        "| step, times full |",
        "|---|---|---|---|---|---|---|",
    ]
    whole = seconds(Way("full"))
    for way, label in _GUIDE.items():
        memory = found["trec", way]
        cells = [label, f"{memory.state / 1e6:.0f}", f"{memory.lean / 1e6:.0f}"]
        for task, digits in (("trec", 1), ("sst2", 1), ("stories", 2)):
            # Small layers have no room for all ranks: the largest there, with its rank.
            there = way if (task, way) in found else Way(way.kind, max(KINDS[way.kind].sizes_for(task)))
            note = "" if there == way else f" (rank {there.size:g})"
            cells.append(f"{found[task, there].mean:.{digits}f} ± {found[task, there].spread:.{digits}f}{note}")
        lines.append(f"| {' | '.join(cells)} | {seconds(way) / whole:.2f} |")
    return "\n".join(lines)


def _devices(rows: Sequence[Row]) -> str:
    names = dict.fromkeys("the CPU" if row.device == "cpu" else f"an {row.device}" for row in rows)
    return " and ".join(names) or "nothing"


def draw_front(found: Sequence[Point], memory: str = "lean") -> Figure:
    """A panel per task: the metric against measured memory, a line along the front."""
    tasks = list(dict.fromkeys(point.task for point in found))
    figure = new_figure(6.4 * max(len(tasks), 1), 5.4)
    axes: Any = figure.subplots(1, max(len(tasks), 1), squeeze=False)[0]
    looks = _looks()
    for ax, task in zip(axes, tasks, strict=False):
        here = [point for point in found if point.task == task]
        line = front(here, memory)
        ax.plot([getattr(p, memory) / 1e6 for p in line], [p.mean for p in line], color="#BBBBBB", lw=5, zorder=0)
        for kind in KINDS:
            some = sorted((p for p in here if p.way.kind == kind), key=lambda p: p.way.size)
            if not some:
                continue
            colour, marker = looks[kind]
            ax.errorbar(
                [getattr(p, memory) / 1e6 for p in some],
                [p.mean for p in some],
                yerr=[p.spread for p in some],
                color=colour,
                marker=marker,
                lw=1.2 if kind in OURS else 0.8,
                ls="-" if kind in OURS else ":",
                capsize=2,
                label=KINDS[kind].label,
            )
        what = {"lean": "peak memory of a step, MB", "peak": "peak memory of a plain step, MB", "state": "held, MB"}
        tidy(ax, TITLES.get(task, task), what[memory], "test accuracy (%)" if here[0].metric == "accuracy" else "loss")
        if here[0].metric != "accuracy":
            ax.invert_yaxis()  # better is up everywhere
    if tasks:
        legend_below(figure, 4)
    return figure


def _looks() -> Mapping[str, tuple[str, str]]:
    ours = dict(zip(OURS, COLOURS, strict=False))
    others = [kind for kind in KINDS if kind not in OURS]
    return {
        kind: (ours.get(kind, "#555555"), "o" if kind in OURS else (*MARKERS[1:], "<", ">")[others.index(kind)])
        for kind in KINDS
    }
