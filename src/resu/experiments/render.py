"""The page of results: tables and a plot from the CSV files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from resu.experiments.leaderboard import Cell, Table, markdown, plot, read_rows, tables
from resu.experiments.methods import methods
from resu.experiments.recipes import Row

__all__ = ["BEGIN", "END", "ORDER", "SPARSE_TRAINING", "around_marks", "fill", "render", "summarize", "write_page"]

SPARSE_TRAINING = (
    *("set", "mest", "mest-soft", "rigl", "srigl", "snfs", "granet", "granet-global", "ac-dc", "ac-dc-global"),
    *("top-kast", "top-kast-global", "ste", "ste-global", "sr-ste"),
)
"""What ``resu leaderboard`` compares beside those of the honest question."""

ORDER = (
    *("dense", "static", "one-shot", "one-shot-global", "gradual", "gradual-global", *SPARSE_TRAINING),
    *("feedback", "straight-through", "straight-through-global"),
    *("inline", "inline-tail", "qresu", "qresu-selective", "dormant-0.3"),
    *("resu-every-16", "resu-every-2", "resu-gamma-3", "resu", "resu-global"),
)
"""Methods in the order of tables: baselines first, then the resurrection methods."""

_PLOTTED = tuple(
    f"{name}{budget}" for name in ("one-shot", "gradual", "straight-through", "resu") for budget in ("", "-global")
)
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
_RESULTS_END = "<!-- results: end -->"
_MARK = re.compile(r"<!-- results: (\S+) -->")
_BETWEEN = re.compile(rf"{_MARK.pattern}\n.*?{_RESULTS_END}", re.DOTALL)
_TITLES = {
    "mlp": "MLP 784-300-100-10, Fashion-MNIST",
    "conv": "Small conv net, Fashion-MNIST",
    "gpt": "Character GPT, 3 layers, tiny shakespeare",
    "digits": "MLP 64-128-64-10, digits",
}
_SHORT = {"mlp": "MLP", "conv": "conv net", "gpt": "GPT (loss)", "digits": "digits"}
_SUMMARY = (("mlp", 0.9), ("mlp", 0.98), ("conv", 0.9), ("conv", 0.98), ("gpt", 0.9))
_SUMMARY_ROWS = {
    "dense": ("dense",),
    "one-shot magnitude": ("one-shot", "one-shot-global"),
    "gradual magnitude": ("gradual", "gradual-global"),
    "feedback": ("feedback",),
    "straight-through": ("straight-through", "straight-through-global"),
    "RESU": ("resu", "resu-global"),
}
_REGIMES = {"scratch": "from scratch", "finetune": "fine-tuning of a trained network"}


def render(folder: str | Path, page: str | Path) -> None:
    """Write tables and a plot (beside the page, as PNG) from every ``honest_*.csv`` in ``folder``.

    A page that exists keeps its text; only what stands between its two table marks is replaced.

    Raises:
        ValueError: If there is no result, or an existing page has no marks.
    """
    page, folder = Path(page), Path(folder)
    found = [table for csv in sorted(folder.glob("honest_*.csv")) for table in tables(read_rows(csv))]
    if not found:
        raise ValueError(f"no result in {folder}: looked for honest_*.csv")
    rank = {name: i for i, name in enumerate(_TITLES)}
    found.sort(key=lambda t: (rank.get(t.task, 99), t.regime != "scratch"))
    before, after = around_marks(page)
    image = page.with_suffix(".png")
    page.parent.mkdir(parents=True, exist_ok=True)
    plot(found, image, _PLOTTED)
    body = "\n\n".join(_section(table) for table in found)
    settings = _settings(found)
    write_page(page, f"{before}{BEGIN}\n\n![Results]({image.name})\n\n{body}\n\n{settings}\n\n{END}{after}")


def summarize(folder: str | Path, page: str | Path) -> None:
    """Write one small table of the fine-tuning results between the marks of an existing page.

    Of each method the better budget counts, ERK or global, chosen on held-out data.

    Raises:
        ValueError: If there is no result, or the page has no marks.
    """
    page, folder = Path(page), Path(folder)
    rows = [row for csv in sorted(folder.glob("honest_*_finetune.csv")) for row in read_rows(csv)]
    columns = [(task, s) for task, s in _SUMMARY if any(r.task == task and r.sparsity == s for r in rows)]
    if not columns:
        raise ValueError(f"no fine-tuning result in {folder}: looked for honest_*_finetune.csv")
    cells = {column: _column(rows, *column) for column in columns}
    head = ["method", *(f"{_SHORT[task]} {100 * s:g} %" for task, s in columns)]
    lines = [head, ["---"] * len(head)]
    lines += [[label, *(cells[column][label] for column in columns)] for label in _SUMMARY_ROWS]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    before, after = around_marks(page)
    write_page(page, f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")


def _column(rows: list[Row], task: str, sparsity: float) -> dict[str, str]:
    """One column of the summary: a text per method; the best sparse one is bold."""
    (table,) = tables(row for row in rows if row.task == task)
    sign = 1 if table.metric == "accuracy" else -1
    digits = 1 if table.metric == "accuracy" else 3
    chosen: dict[str, Cell] = {}
    for label, names in _SUMMARY_ROWS.items():
        held_out: dict[str, list[float]] = {}
        for row in rows:
            wanted = 0.0 if row.method == "dense" else sparsity
            if row.task == task and row.sparsity == wanted and row.method in names:
                held_out.setdefault(row.method, []).append(sign * row.val)
        if held_out:
            name = max(held_out, key=lambda n: fmean(held_out[n]))
            chosen[label] = table.cells[name][0.0 if name == "dense" else sparsity]
    best = max((k for k in chosen if k != "dense"), key=lambda k: sign * chosen[k].mean, default="")
    texts = {k: f"{cell.mean:.{digits}f} ± {cell.std:.{digits}f}" for k, cell in chosen.items()}
    return {k: f"**{texts[k]}**" if k == best else texts.get(k, "–") for k in _SUMMARY_ROWS}


def around_marks(page: Path, title: str = "Which way of pruning is best?") -> tuple[str, str]:
    """The text of the page before and after its table marks; a title where there is no page yet."""
    if not page.exists():
        return f"# {title}\n\n", "\n"
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} exists and has no marks {BEGIN} … {END} to write tables between")
    return before, after


def fill(page: str | Path, table: Callable[[str], str | None]) -> list[str]:
    """Replace what stands between ``<!-- results: NAME -->`` and ``<!-- results: end -->``; a page may have several.

    Args:
        page: A Markdown page; its other text stays.
        table: ``table(NAME)``: what to write there, or None to leave it as it is.

    Returns:
        The names that were filled in.

    Raises:
        ValueError: If a mark has no end.
    """
    page, filled = Path(page), []
    before = page.read_text(encoding="utf-8")
    marks = _MARK.findall(before)
    if "end" in marks[::2] or marks[1::2] != ["end"] * (len(marks) // 2) or len(marks) % 2:
        raise ValueError(f"{page} has a mark for results without its end, {_RESULTS_END}: {', '.join(marks)}")

    def put(mark: re.Match[str]) -> str:
        found = table(mark[1])
        if found is None:
            return mark[0]
        filled.append(mark[1])
        return f"<!-- results: {mark[1]} -->\n{found}\n{_RESULTS_END}"

    after = _BETWEEN.sub(put, before)
    if after != before:
        write_page(page, after)
    return filled


def write_page(page: Path, text: str) -> None:
    """Replace a page, whole or not at all."""
    scratch = page.with_suffix(".part")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(page)


def _section(table: Table) -> str:
    metric = "test accuracy in percent" if table.metric == "accuracy" else "test loss in nats, lower is better"
    exact = "Counts and zeros of every sparse run are exact." if table.exact else "NOT every run is exact."
    title = f"### {_TITLES.get(table.task, table.task)}: {_REGIMES[table.regime]}"
    note = f"{table.steps} steps, {table.recipe}; {metric}, mean ± standard deviation over seeds. {exact}"
    return f"{title}\n\n{note}\n\n{markdown(table, ORDER)}"


def _settings(found: list[Table]) -> str:
    """What each method did, as it stands in the CSV files."""
    lines = ["### What ran", ""]
    names = {name for table in found for name in table.cells}
    for name in [*(n for n in ORDER if n in names), *sorted(names - set(ORDER))]:
        about = (methods[name].__doc__ or "").partition("\n")[0] if name in methods else ""
        lines.append(f"- `{name}`{': ' + about if about else ''}")
        for table in found:
            if name in table.settings and name != "dense":
                lines.append(f"  - {table.task}, {table.regime}: `{table.settings[name]}`")
    return "\n".join(lines)
