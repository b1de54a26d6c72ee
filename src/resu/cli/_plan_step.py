"""``resu plan --batch``: whole fine-tuning steps of a model, by method, followed without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resu.cli._common import (
    CliError,
    format_bytes,
    format_count,
    print_json,
    require,
    shown_progress,
    stdout,
)

if TYPE_CHECKING:
    from resu.integrations.hf_plan import StepMemory
    from resu.integrations.training_program import Setup

__all__ = ["plan_steps"]

DTYPES = ("float32", "bfloat16", "float16")
# What makes a step smaller at the price of time alone, in this order.
_CHEAPER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("in_backward", {"in_backward": True}),
    ("gradient_checkpointing", {"checkpointing": True}),
    ("both", {"in_backward": True, "checkpointing": True}),
)


def plan_steps(
    path: Path, methods: Sequence[str] | None, options: dict[str, Any], budget: int | None, *, as_json: bool
) -> None:
    """Predict and tell the memory of a step of each method.

    Args:
        path: A ``config.json``, or its folder.
        methods: Names; None or empty: all.
        options: Of :class:`resu.integrations.training_program.Setup`, dtypes by name.
        budget: Bytes that there are, or None.
        as_json: Whether for machines.
    """
    require("transformers", "hf")
    import torch

    from resu.integrations.training_program import METHODS, Setup, read_config

    for name in ("dtype", "theta_dtype"):
        if options[name] not in DTYPES:
            option = "--" + name.replace("_", "-")
            raise CliError(f"unknown {option} {options[name]!r}; known: {', '.join(DTYPES)}")
    typed = {**options, **{name: getattr(torch, options[name]) for name in ("dtype", "theta_dtype")}}
    try:
        config, _ = read_config(path)
        setups = [Setup(method=name, **typed) for name in methods or METHODS]
    except (ValueError, OSError) as error:
        raise CliError(str(error)) from None
    rows = []
    with shown_progress("planning") as told:
        for index, setup in enumerate(setups):
            rows.append(_row(config, setup, budget, asked=bool(methods)))
            told(index + 1, len(setups), setup.method)
    if as_json:
        print_json({"config": str(path), **options, "memory": budget, "methods": rows})
    else:
        _tell(rows, options, budget)


def _row(config: Any, setup: Setup, budget: int | None, *, asked: bool) -> dict[str, Any]:
    """One method: bytes, and where it does not fit what would make it fit."""
    from resu.integrations.training_program import METHODS

    row: dict[str, Any] = {"method": setup.method, "label": METHODS[setup.method]}
    try:
        found = _predicted(config, setup)
    except (ValueError, ImportError) as error:
        if asked:
            raise CliError(str(error)) from None
        return {**row, "problem": str(error)}
    row |= {
        "trained": found.trained,
        "weights": found.weights,
        "state": found.state,
        "step": found.step,
        "peak": found.peak,
        "fits": None if budget is None else found.peak <= budget,
        "fits_with": None,
    }
    if budget is not None and found.peak > budget:
        # Weights and state alone are there in any case.
        for name, changes in _CHEAPER if found.weights + found.state <= budget else ():
            other = replace(setup, **changes)
            if other != setup and _predicted(config, other).peak <= budget:
                row["fits_with"] = name
                break
    return row


def _predicted(config: Any, setup: Setup) -> StepMemory:
    from resu.integrations.hf_plan import predict_step

    return predict_step(config, setup)


def _tell(rows: list[dict[str, Any]], options: dict[str, Any], budget: int | None) -> None:
    from rich.table import Table

    how = [
        name for name, on in (("checkpointing", "checkpointing"), ("updates in backward", "in_backward")) if options[on]
    ]
    title = (
        f"One step of {options['batch']} × {options['length']} tokens, {options['dtype']}, sparsity "
        f"{100 * options['sparsity']:g} %, θ of the quantized modes {options['theta_dtype']}, {options['optimizer']}"
        + "".join(f", {name}" for name in how)
    )
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for name in ("trains", "weights", "optimizer", "step", "peak"):
        table.add_column(name, justify="right")
    if budget is not None:
        table.add_column(f"fits in {format_bytes(budget)}", justify="right")
    for row in rows:
        if "problem" in row:
            table.add_row(row["label"], *["–"] * (5 if budget is None else 6))
            continue
        cells = [
            format_count(row["trained"]),
            *(format_bytes(row[key]) for key in ("weights", "state", "step", "peak")),
        ]
        if budget is not None:
            cells.append("yes" if row["fits"] else _why_not(row, budget))
        table.add_row(row["label"], *cells)
    console = stdout(140)
    console.print(table)
    for row in rows:
        if "problem" in row:
            console.print(f"{row['label']}: {row['problem']}", markup=False)
    console.print(
        "step: activations, gradients and temporaries, on top of weights and optimizer state at the peak. "
        "The process itself (Python, torch) comes on top.",
        markup=False,
    )


def _why_not(row: dict[str, Any], budget: int) -> str:
    names = {
        "in_backward": "with --in-backward",
        "gradient_checkpointing": "with --gradient-checkpointing",
        "both": "with --in-backward --gradient-checkpointing",
    }
    over = f"no, {format_bytes(row['peak'] - budget)} over"
    return over if row["fits_with"] is None else f"{over}; {names[row['fits_with']]}: yes"
