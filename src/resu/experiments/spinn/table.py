"""Rows to the tables of the page: mean and spread over seeds, tools left out, adaptation, known fields."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, median, pstdev, stdev

from resu.experiments.spinn.adaptation import PENALTIES
from resu.experiments.spinn.results import FieldRow, LeftOutRow, NewToolRow, OriginRow, Results, TwinRow
from resu.experiments.spinn.runs import RIDGE_MORE, WAYS

__all__ = ["main_table", "pooled_r2", "tables"]

NAMES = {"wear": "turning wear", "milling": "milling wear", "thermal": "displacement"}


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation; of one value, itself.

    Example:
        >>> spread([0.9, 0.92]), spread([0.5])
        ('0.910 ± 0.014', '0.500')
    """
    if not values:
        return "–"
    return f"{fmean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main_table(twins: Sequence[TwinRow]) -> str:
    """R² on held-out rows by way and quantity; ``overall`` is the mean over quantities, seed by seed."""
    names = [name for name in NAMES if any(row.quantity == name for row in twins)]
    lines = []
    for way, physics in [("ridge", False), (RIDGE_MORE, False), *((w, p) for w in WAYS for p in (False, True))]:
        some = [row for row in twins if row.way == way and row.physics == physics]
        if not some:
            continue
        by = {name: {row.seed: row for row in some if row.quantity == name} for name in names}
        seeds = sorted(set.intersection(*(set(found) for found in by.values())))
        overall = [fmean(by[name][seed].test for name in names) for seed in seeds]
        removed = fmean(row.sparsity for row in some)
        label = way if way.startswith("ridge") else f"{way}, {'with' if physics else 'without'} physics"
        cells = [spread([row.test for row in by[name].values()]) for name in names]
        gone = "" if way not in WAYS[1:] else f"{100 * removed:.1f} %"
        counts = "/".join(str(len(by[name])) for name in names)
        lines.append([label, gone, *cells, spread(overall), counts])
    return markdown(["", "removed", *(NAMES[name] for name in names), "overall", "seeds"], lines)


def pooled_r2(squared: Sequence[float], counts: Sequence[int], targets: Sequence[float]) -> float:
    """R² over groups that were left out in turn: 1 − total squared error / (rows · variance of all targets)."""
    if len(squared) != len(counts) or sum(counts) != len(targets):
        raise ValueError("each group needs its error and its rows, and all rows their target")
    return 1 - math.fsum(squared) / (len(targets) * pstdev(targets) ** 2)


def left_out_table(some: Sequence[LeftOutRow], targets: Sequence[float]) -> str:
    """R² per group left out, its spread, and pooled over all."""
    groups = sorted({row.group for row in some})
    ways = [way for way in ("ridge", "dense", "sparse") if any(row.way == way for row in some)]
    at = {(row.way, row.group): row for row in some}
    lines = [
        [str(group), *("–" if math.isnan(at[way, group].test) else f"{at[way, group].test:.2f}" for way in ways)]
        for group in groups
    ]

    def line(label: str, of: Callable[[list[float]], float]) -> None:
        values = {way: [at[way, g].test for g in groups if not math.isnan(at[way, g].test)] for way in ways}
        lines.append([label, *(f"{of(values[way]):.2f}" for way in ways)])

    line("median", median)
    line("lowest", min)
    pooled = []
    for way in ways:
        errors, counts = zip(*((at[way, g].squared, at[way, g].rows) for g in groups), strict=True)
        pooled.append(f"**{pooled_r2(errors, counts, targets):.3f}**" if sum(counts) == len(targets) else "–")
    lines.append(["**all rows together**", *pooled])
    return markdown(["left out", *ways], lines)


def new_tool_table(rows: Sequence[NewToolRow], unit: str) -> str:
    """Per new tool errors before, adapted and retrained, over all seeds, and the gain recovered; then all together."""
    lines, every = [], []
    for group in sorted({row.group for row in rows}):
        every.append(_squares([row for row in rows if row.group == group]))
        lines.append([str(group), *_gains(every[-1])])
    total = _squares(rows)
    lines.append(["**all rows together**", *_gains(total)])
    lines.append(["median of squared error / before", *_over_before(every, median), *[""] * 3])
    lines.append(["highest of squared error / before", *_over_before(every, max), *[""] * 3])
    gained = sum(squares[-1] < squares[0] for squares in every)
    costs = [f"{100 * fmean(values):.1f} %" for values in ([r.cost for r in rows], [r.time for r in rows])]
    by_seed = {seed: _squares([row for row in rows if row.seed == seed]) for seed in sorted({r.seed for r in rows})}
    seeds = "; ".join(
        f"{100 * (1 - squares[1] / squares[0]):.0f} % and {100 * (1 - squares[-1] / squares[0]):.0f} %"
        for squares in by_seed.values()
    )
    end = (
        f"Retraining gains something on {gained} of {len(every)}. Adapting costs {costs[0]} of its multiply-adds and "
        f"{costs[1]} of its time. Squared error that mixing and retraining take away, seed by seed: {seeds}."
    )
    kinds = ("mixed", "equal shares", "best single")
    head = [f"RMS error, {unit}", "before", *kinds, "retrained", *(f"recovered, {kind}" for kind in kinds)]
    return markdown(head, lines) + "\n\n" + end


def _squares(rows: Sequence[NewToolRow]) -> list[float]:
    """Mean squared errors before, adapted three ways, retrained, over all rows."""
    weights = [float(row.rest) for row in rows]
    each = [(row.before, row.mixed, row.equal, row.single, row.retrained) for row in rows]
    return [fmean([error**2 for error in column], weights) for column in zip(*each, strict=True)]


def _gains(squares: Sequence[float]) -> list[str]:
    before, *adapted, retrained = squares
    shares = [
        f"{100 * (before - square) / (before - retrained):.0f} %" if retrained < before else "no gain to recover"
        for square in adapted
    ]
    return [*(f"{math.sqrt(square):.3g}" for square in squares), *shares]


def _over_before(every: Sequence[Sequence[float]], of: Callable[[list[float]], float]) -> list[str]:
    ratios = [[square / squares[0] for square in squares] for squares in every]
    return [f"{of(list(column)):.2f}" for column in zip(*ratios, strict=True)]


def share_table(rows: Sequence[NewToolRow]) -> str:
    """The mean share of each candidate over new tools, by quantity."""
    head = ["shares", "the layer as it is", *(f"penalty {penalty:g}" for penalty in PENALTIES)]
    lines = []
    for name in dict.fromkeys(row.quantity for row in rows):
        columns = zip(*(row.shares for row in rows if row.quantity == name), strict=True)
        lines.append([NAMES[name], *(f"{fmean(column):.2f}" for column in columns)])
    return markdown(head, lines)


def origins_table(some: Sequence[OriginRow]) -> str:
    """R² at rolling origins, one block ahead, with the mean that choices went by; and far ahead."""
    lines = []
    for way, physics in dict.fromkeys((row.way, row.physics) for row in some):
        here = [row for row in some if (row.way, row.physics) == (way, physics)]
        near, far = (
            [f"{fmean(column):.3f}" for column in zip(*values, strict=True)]
            for values in ([row.near for row in here], [row.far for row in here])
        )
        label = way if way == "ridge" else f"{way}, {'with' if physics else 'without'} physics"
        lines.append([label, *near, spread([fmean(row.near) for row in here]), *far])
    head = ["trained on", *(f"{k}/7" for k in range(3, 7)), "mean", *(f"{k}/7, far" for k in range(3, 6))]
    return markdown(head, lines)


def field_table(some: Sequence[FieldRow]) -> str:
    """Relative L2 error of each equation, dense and sparse."""
    lines = [
        [
            row.quantity,
            row.way,
            f"{100 * row.sparsity:.1f} %",
            f"{row.parameters}",
            f"{row.error:.2e}",
            f"{row.seconds:.0f}",
        ]
        for row in some
    ]
    return markdown(["equation", "", "removed", "parameters", "relative L2 error", "seconds"], lines)


def physics_table(twins: Sequence[TwinRow]) -> str:
    """What the laws say of the twins of seed 0, as text."""
    some = [row for row in twins if row.physics and row.seed == 0]
    return "\n".join(f"- {NAMES[row.quantity]}, {row.way}: {row.told}" for row in some)


def tables(found: Results, targets: Mapping[str, Sequence[float]], units: Mapping[str, str]) -> str:
    """All tables that the rows allow, as one text.

    Args:
        found: Rows of any studies.
        targets: Per quantity all its targets, for R² over groups left out.
        units: Per quantity the unit of its target.
    """
    parts = []
    if found.twins:
        parts += [
            "R² on held-out tools, cases and times, mean ± standard deviation over seeds:",
            main_table(found.twins),
        ]
    if found.origins:
        parts += [
            "R² of displacement within the training and validation parts, three seeds: at rolling origins, which "
            "choices went by (the next seventh is judged), and far ones (a seventh is left out, all after it is "
            "judged):",
            origins_table(found.origins),
        ]
    for name, values in targets.items():
        if left_out := [row for row in found.left_out if row.quantity == name]:
            title = f"R² of {NAMES[name]} with one group left out at a time, seed 0:"
            parts += [title, left_out_table(left_out, values)]
    for name, unit in units.items():
        if new_tools := [row for row in found.new_tools if row.quantity == name]:
            parts += [
                f"A new tool, {NAMES[name]}: each in turn is unknown to a sparse twin, which then sees the first 30 % "
                "of its life; errors on the rest, three seeds:",
                new_tool_table(new_tools, unit),
            ]
    if found.new_tools:
        parts += ["Shares of the candidates in these mixtures, mean over new tools:", share_table(found.new_tools)]
    if found.fields:
        parts += ["Known solutions:", field_table(found.fields)]
    if any(row.physics for row in found.twins):
        title = "Residuals of the laws on held-out rows (RMS), and learned constants, seed 0:"
        parts += [title, physics_table(found.twins)]
    return "\n\n".join(parts)
