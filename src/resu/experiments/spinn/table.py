"""Rows to the tables of the page: mean and spread over seeds, tools left out, adaptation, known fields."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, median, pstdev, stdev

from resu.experiments.spinn.runs import RIDGE_MORE, WAYS, Row

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


def main_table(rows: Sequence[Row]) -> str:
    """R² on held-out rows by way and quantity; ``overall`` is the mean over quantities, seed by seed."""
    twins = [row for row in rows if row.study == "twin"]
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


def _squared(row: Row) -> tuple[float, int]:
    found = re.search(r"squared error (\S+) over (\d+) rows", row.detail)
    assert found is not None, row.detail
    return float(found[1]), int(found[2])


def left_out_table(rows: Sequence[Row], quantity: str, targets: Sequence[float]) -> str:
    """R² per group left out, its spread, and pooled over all."""
    some = [row for row in rows if row.study == "leave one out" and row.quantity == quantity]
    groups = sorted({row.group for row in some}, key=int)
    ways = [way for way in ("ridge", "dense", "sparse") if any(row.way == way for row in some)]
    at = {(row.way, row.group): row for row in some}
    lines = [
        [group, *("–" if math.isnan(at[way, group].test) else f"{at[way, group].test:.2f}" for way in ways)]
        for group in groups
    ]

    def line(label: str, of: Callable[[list[float]], float]) -> None:
        values = {way: [at[way, g].test for g in groups if not math.isnan(at[way, g].test)] for way in ways}
        lines.append([label, *(f"{of(sorted(values[way])):.2f}" for way in ways)])

    line("median", lambda v: v[len(v) // 2])
    line("lowest", lambda v: v[0])
    pooled = []
    for way in ways:
        errors, counts = zip(*(_squared(at[way, g]) for g in groups), strict=True)
        pooled.append(f"**{pooled_r2(errors, counts, targets):.3f}**" if sum(counts) == len(targets) else "–")
    lines.append(["**all rows together**", *pooled])
    return markdown(["left out", *ways], lines)


_ADAPTED = re.compile(
    r"RMSE (\S+): before (\S+), adapted (\S+) / (\S+), retrained (\S+), over (\d+) rows; "
    r"multiply-adds (\S+), processor time ([^\s;]+); weight · penalty (.+) / (.+)"
)


def adaptation_table(rows: Sequence[Row], quantity: str) -> str:
    """Per new tool errors before, adapted and retrained, over all seeds, and the gain recovered; then all together.

    Two strengths: the best for the other tools by the sum of squared errors, and by their geometric mean.
    """
    some = [row for row in rows if row.study == "adaptation" and row.quantity == quantity]
    lines, every, told = [], [], [_adapted(row) for row in some]
    for group in sorted({row.group for row in some}, key=int):
        here = [found for found, row in zip(told, some, strict=True) if row.group == group]
        every.append(_squares(here))
        lines.append([group, *_gains(every[-1]), *here[0][8:]])
    total = _squares(told)
    lines.append(["**all rows together**", *_gains(total), "", ""])
    middle = [f"{median(squares[i] / squares[0] for squares in every):.2f}" for i in range(4)]
    lines.append(["median of squared error / before", *middle, "", "", "", ""])
    gained = sum(squares[3] < squares[0] for squares in every)
    costs = [f"{100 * fmean(float(found[i]) for found in told):.1f} %" for i in (6, 7)]
    end = (
        f"Retraining gains something on {gained} of {len(every)}. Adapting costs {costs[0]} of its multiply-adds and "
        f"{costs[1]} of its time."
    )
    kinds = ("sum", "mean of logs")
    head = [f"RMS error, {told[0][0]}", "before", *(f"adapted, {k}" for k in kinds), "retrained"]
    head += [*(f"recovered, {k}" for k in kinds), *(f"weight · penalty, {k}" for k in kinds)]
    return markdown(head, lines) + "\n\n" + end


def _adapted(row: Row) -> tuple[str, ...]:
    """Unit; errors before, adapted twice, retrained; rows; cost in multiply-adds and in time; two strengths."""
    found = _ADAPTED.fullmatch(row.detail)
    assert found is not None, row.detail
    return found.groups()


def _squares(found: Sequence[tuple[str, ...]]) -> list[float]:
    """Mean squared errors before, adapted twice, retrained, over all rows."""
    return [fmean((float(f[i]) ** 2 for f in found), [float(f[5]) for f in found]) for i in range(1, 5)]


def _gains(squares: Sequence[float]) -> list[str]:
    before, *adapted, retrained = squares
    shares = [
        f"{100 * (before - square) / (before - retrained):.0f} %" if retrained < before else "no gain to recover"
        for square in adapted
    ]
    return [*(f"{math.sqrt(square):.3g}" for square in squares), *shares]


def origins_table(rows: Sequence[Row]) -> str:
    """R² at rolling origins, one block ahead, with the mean that choices went by; and far ahead."""
    some = [row for row in rows if row.study == "origins"]
    lines = []
    for way, physics in dict.fromkeys((row.way, row.physics) for row in some):
        here = [row for row in some if (row.way, row.physics) == (way, physics)]
        near, far = (
            [f"{fmean(column):.3f}" for column in zip(*values, strict=True)]
            for values in zip(*(_near_and_far(row.detail) for row in here), strict=True)
        )
        label = way if way == "ridge" else f"{way}, {'with' if physics else 'without'} physics"
        lines.append([label, *near, spread([row.test for row in here]), *far])
    head = ["trained on", *(f"{k}/7" for k in range(3, 7)), "mean", *(f"{k}/7, far" for k in range(3, 6))]
    return markdown(head, lines)


def _near_and_far(detail: str) -> tuple[list[float], list[float]]:
    near, far = (part.split(" ", 1)[1].split(", ") for part in detail.split("; "))
    return [float(r2) for r2 in near], [float(r2) for r2 in far]


def field_table(rows: Sequence[Row]) -> str:
    """Relative L2 error of each equation, dense and sparse."""
    some = [row for row in rows if row.study == "field"]
    lines = [
        [
            row.quantity,
            row.way,
            f"{100 * row.sparsity:.1f} %",
            f"{row.parameters}",
            f"{row.test:.2e}",
            f"{row.seconds:.0f}",
        ]
        for row in some
    ]
    return markdown(["equation", "", "removed", "parameters", "relative L2 error", "seconds"], lines)


def physics_table(rows: Sequence[Row]) -> str:
    """What the laws say of the twins of seed 0, as text."""
    some = [row for row in rows if row.study == "twin" and row.physics and row.seed == 0]
    return "\n".join(f"- {NAMES[row.quantity]}, {row.way}: {row.detail}" for row in some)


def tables(rows: Sequence[Row], targets: Mapping[str, Sequence[float]]) -> str:
    """All tables that the rows allow, as one text.

    Args:
        rows: Of any studies.
        targets: Per quantity all its targets, for R² over groups left out.
    """
    parts = []
    if any(row.study == "twin" for row in rows):
        parts += ["R² on held-out tools, cases and times, mean ± standard deviation over seeds:", main_table(rows)]
    if any(row.study == "origins" for row in rows):
        parts += [
            "R² of displacement within the training and validation parts, three seeds: at rolling origins, which "
            "choices went by (the next seventh is judged), and far ones (a seventh is left out, all after it is "
            "judged):",
            origins_table(rows),
        ]
    for name, values in targets.items():
        if any(row.study == "leave one out" and row.quantity == name for row in rows):
            parts += [
                f"R² of {NAMES[name]} with one group left out at a time, seed 0:",
                left_out_table(rows, name, values),
            ]
    for name in NAMES:
        if any(row.study == "adaptation" and row.quantity == name for row in rows):
            parts += [
                f"A new tool, {NAMES[name]}: each in turn is unknown to a sparse twin, which then sees the first 30 % "
                "of its life; errors on the rest, three seeds:",
                adaptation_table(rows, name),
            ]
    if any(row.study == "field" for row in rows):
        parts += ["Known solutions:", field_table(rows)]
    if any(row.physics and row.study == "twin" for row in rows):
        parts += ["Residuals of the laws on held-out rows (RMS), and learned constants, seed 0:", physics_table(rows)]
    return "\n\n".join(parts)
