"""Results of one-shot pruning by method: rows of a CSV, and the tables that the method pages show."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from resu.experiments.render import fill

__all__ = ["LEVELS", "METHODS", "MODELS", "Run", "Setting", "render_pages", "table"]

MODELS = {"stories260K": "perplexity", "all-MiniLM-L6-v2": "cosine"}


@dataclass(frozen=True)
class Setting:
    """A way of pruning: what :func:`resu.pruning.one_shot.prune_model` is asked for."""

    method: str
    refine: str = ""
    update: str = ""
    distribution: str = ""

    @property
    def label(self) -> str:
        """As tables call it."""
        extra = [f"+ {name}" for name in (self.refine, self.update and f"{self.update} update") if name]
        budget = [f"({self.distribution})"] if self.distribution else []
        return " ".join([self.method, *extra, *budget])

    @property
    def options(self) -> dict[str, Any]:
        """As keyword arguments."""
        return {"refine": self.refine or None, "update": self.update or None, "distribution": self.distribution or None}


METHODS = (
    *(Setting(name) for name in ("random", "magnitude", "gradient", "taylor", "fisher", "wanda", "ria", "sparsegpt")),
    Setting("magnitude", refine="dsnot"),
    Setting("wanda", refine="dsnot"),
    Setting("magnitude", update="sparsegpt"),
    Setting("wanda", update="sparsegpt"),
    *(Setting("magnitude", distribution=name) for name in ("uniform", "er", "erk", "global", "lamp", "owl")),
    *(Setting("wanda", distribution=name) for name in ("uniform", "er", "erk", "global", "lamp", "owl")),
)
# Sparsity and pattern; "" is single weights.
LEVELS = {
    "stories260K": ((0.3, ""), (0.5, ""), (0.6, ""), (0.5, "2:4"), (0.5, "4:8")),
    "all-MiniLM-L6-v2": ((0.5, ""), (0.7, ""), (0.5, "2:4")),
}


@dataclass(frozen=True)
class Run:
    """One pruned model; a line of the CSV."""

    model: str
    method: str
    refine: str
    update: str
    distribution: str
    pattern: str
    sparsity: float
    actual: float
    seed: int
    metric: str
    dense: float
    value: float
    seconds: float
    torch: str

    @property
    def key(self) -> tuple[object, ...]:
        """What tells runs apart."""
        return (self.model, self.setting, self.sparsity, self.pattern, self.seed)

    @property
    def setting(self) -> Setting:
        """What was asked for."""
        return Setting(self.method, self.refine, self.update, self.distribution)


def _number(value: float, digits: int) -> str:
    """``digits`` after the point, fewer where the number is large: 9.24, 107, 7,410."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.{digits}f}"


def _cell(values: Sequence[float], metric: str) -> str:
    """Mean and, where runs differ, their standard deviation."""
    if not values:
        return "–"
    digits = 3 if metric == "cosine" else 2
    mean, spread = fmean(values), stdev(values) if len(values) > 1 else 0.0
    # To the mean's last place.
    deviation = f" ± {_number(spread, 0 if mean >= 100 else digits)}" if spread else ""
    return _number(mean, digits) + deviation


def table(runs: Sequence[Run], model: str, keep: Callable[[Setting], bool]) -> str:
    """One model's results as a Markdown table; settings in the order of :data:`METHODS`."""
    metric = MODELS[model]
    mine = [run for run in runs if run.model == model and keep(run.setting)]
    columns = [level for level in LEVELS[model] if any((r.sparsity, r.pattern) == level for r in mine)]
    dense = next(run.dense for run in runs if run.model == model)
    head = "perplexity (lower is better)" if metric == "perplexity" else "cosine (higher is better)"
    lines = [
        f"| {model}: {head}, dense {dense:.4g} | " + " | ".join(p or f"{100 * s:g} %" for s, p in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for setting in METHODS:
        rows = [run for run in mine if run.setting == setting]
        if rows:
            cells = [_cell([r.value for r in rows if (r.sparsity, r.pattern) == level], metric) for level in columns]
            lines.append(f"| {setting.label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _about(name: str) -> Callable[[Setting], bool]:
    """Which settings a page shows: its own, and random, magnitude, Wanda and SparseGPT beside them."""
    plain = {"random", "magnitude", "wanda", "sparsegpt"}
    if name == "all":
        return lambda s: True
    if name == "distributions":
        return lambda s: bool(s.distribution) or s in (Setting("magnitude"), Setting("wanda"))
    if name == "dsnot":
        return lambda s: s.refine == "dsnot" or s in (Setting("magnitude"), Setting("wanda"), Setting("sparsegpt"))
    own = {"gradients": {"gradient", "taylor", "fisher"}}.get(name, {name})
    updates = name == "sparsegpt"
    return lambda s: (
        not s.refine
        and (not s.update or updates)
        and (s.method in plain | own)
        and (
            not s.distribution or (name == "lamp" and s.distribution in ("global", "lamp") and s.method == "magnitude")
        )
    )


def render_pages(runs: Sequence[Run], folder: str | os.PathLike[str]) -> list[str]:
    """Fill in every page of a folder that has ``<!-- results: NAME -->`` … ``<!-- results: end -->``.

    Args:
        runs: All results.
        folder: Of Markdown pages; NAME is ``all``, ``distributions``, ``gradients`` or a method.

    Returns:
        The pages that were written.

    Raises:
        ValueError: If a mark has no end.
    """

    def tables(name: str) -> str:
        models = [model for model in MODELS if any(run.model == model for run in runs)]
        return "\n\n".join(table(runs, model, _about(name)) for model in models)

    return [page.name for page in sorted(Path(folder).glob("*.md")) if fill(page, tables)]
