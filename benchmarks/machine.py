"""What a benchmark ran on."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path


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
