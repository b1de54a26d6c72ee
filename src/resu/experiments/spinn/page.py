"""The one-page report of a twin, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["page"]

TITLES = {
    "wear": "Flank wear while turning",
    "milling": "Flank wear while milling",
    "thermal": "Displacement by heat",
}
_ONE = (
    "The twin has one network per quantity, since no public recording has wear and displacement of one machine; this "
    "page is of one of them."
)


def page(report: Mapping[str, Any]) -> str:
    """What ``report.json`` holds, as a page with two figures beside it.

    Args:
        report: As :func:`~resu.experiments.spinn.application.build` returns it.
    """
    quantity = report["settings"]["quantity"]
    held = {key: value for key, value in report["held_out"].items() if key != "rows"}
    where = "; ".join(f"{name} {', '.join(map(str, groups))}" for name, groups in held.items())
    if quantity == "thermal":
        where = "the last 30 % of the time"
    parts = [
        f"# {TITLES[quantity]}\n\n{_ONE}\n",
        f"Held out: {where} ({report['held_out']['rows']} rows). R² is the mean over channels.\n",
        "![Measured and predicted](measured.png)\n",
        _networks(report),
        _physics(report),
        "## Pruning, stage by stage\n",
        _stages(report),
        "![What pruning removed](removed.png)\n",
        *([_new_tools(report)] if report["new_tools"] else []),
    ]
    if report["settings"]["quick"]:
        parts.insert(
            1, "**A quick run: a small network and few steps. Its figures say that everything runs, no more.**\n"
        )
    return "\n".join(parts)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _networks(report: Mapping[str, Any]) -> str:
    rows, times = [], report["latency_us"]
    for name, network in report["networks"].items():
        rmse = ", ".join(f"{error:.3g}" for error in network["rmse"])
        removed = f"{100 * network['removed']:.1f} %" if "removed" in network else ""
        time = f"{times[name]:.0f}" if name in times else ""
        if name == "sparse":
            time += f" ({times['sparse, packed']:.0f} packed)"
        rows.append([name, f"{network['parameters']:,}".replace(",", " "), removed, f"{network['r2']:.3f}", rmse, time])
    head = ["", "parameters", "removed", "R²", f"error (RMS), {report['unit']}", "one prediction, µs"]
    return _table(head, rows)


def _physics(report: Mapping[str, Any]) -> str:
    dense = report["networks"]["dense"]
    if not dense["physics"]:
        return "No law of physics was part of the loss.\n"
    names = [name for name in report["networks"] if name != "ridge"]
    rows = [
        [term, *(f"{report['networks'][n]['physics'][term]['rms']:.3g}" for n in names), dense["physics"][term]["unit"]]
        for term in dense["physics"]
    ]
    told = [f"- {name}: {value}" for name, value in report["networks"]["sparse"]["constants"].items()]
    terms = _table(["off by (RMS)", *names, "unit"], rows)
    return f"## Physics\n\n{terms}\nLearned constants of the sparse network:\n\n" + "\n".join(told) + "\n"


def _new_tools(report: Mapping[str, Any]) -> str:
    kind = next(iter(report["held_out"]))
    rows = [
        [
            *(f"{found['group']}", f"{found['rest']}", f"{found['before']:.3g}", f"{found['adapted']:.3g}"),
            *(f"{found['retrained']:.3g}", f"{100 * found['cost']:.1f} %"),
        ]
        for found in report["new_tools"]
    ]
    head = [kind, "rows judged", "before", "adapted", "trained anew", "multiply-adds of adapting"]
    return (
        f"## A new {kind}\n\nThe sparse twin learns from the first 30 % of what it does not know, in its output layer "
        "alone, or a dense one is trained again with it (these rows count ten times). Errors (RMS, "
        f"{report['unit']}) are those on the rest; multiply-adds are a share of training's.\n\n{_table(head, rows)}"
    )


def _stages(report: Mapping[str, Any]) -> str:
    rows = [["0", "", "", f"{report['validation_before']:.3f}", ""]]
    for stage in report["stages"]:
        fate = "kept" if stage["accepted"] else "taken back"
        rows.append(
            [
                *(f"{stage['stage']}", f"{100 * stage['fraction']:.1f} %", f"{100 * stage['actual']:.2f} %"),
                *(f"{stage['score']:.3f}", fate),
            ]
        )
    text = _table(["stage", "of what was active", "sparsity of weights", "R², validation part", ""], rows)
    last = [stage for stage in report["stages"] if stage["accepted"]]
    if last:
        layers = [
            [n, f"{v['kept']}", f"{v['numel']}", f"{100 * v['sparsity']:.2f} %"] for n, v in last[-1]["layers"].items()
        ]
        text += "\n" + _table(["layer", "kept", "of", "sparsity"], layers)
    return text
