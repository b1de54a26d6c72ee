"""What a benchmark ran on, and its results as a file."""

from __future__ import annotations

import csv
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine() -> dict[str, str]:
    """Where this ran."""
    model, flags = platform.processor(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
        found = next((line for line in lines if line.startswith("flags")), "")
        flags = " ".join(f for f in ("avx2", "fma", "avx512f", "avx512_vbmi2", "amx_bf16") if f" {f}" in found)
    return {"cpu": model, "flags": flags, "torch": version("torch"), "python": platform.python_version()}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV of rows with the same keys; what was there is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
