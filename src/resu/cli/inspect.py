"""``resu inspect``: what is in a checkpoint or mask file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from resu.cli._common import Json, format_bytes, format_count, print_json, stdout

EXAMPLE = "Example: resu inspect resu_quickstart/model.safetensors"

_BARS = 40
_BINS = 10


def command(
    file: Annotated[Path, typer.Argument(help="A checkpoint or mask file, or a folder of sharded safetensors.")],
    as_json: Json = False,
) -> None:
    """Show what a checkpoint or mask file holds: sparsity, kept weights and bytes of each tensor."""
    from resu.formats.inspect import describe

    found = describe(file)
    if as_json:
        print_json(found)
    else:
        _tell(file, found)


def histogram(sparsities: Sequence[float]) -> list[str]:
    """How many tensors have which sparsity, as text; empty bins at both ends are left out.

    Example:
        >>> print("\\n".join(histogram([0.5, 0.55, 0.55, 0.81])))
          50– 60 %  ████████████████████████████████████████ 3
          60– 70 %  0
          70– 80 %  0
          80– 90 %  █████████████ 1
    """
    counts = [0] * _BINS
    for sparsity in sparsities:
        counts[min(_BINS - 1, int(sparsity * _BINS + 1e-9))] += 1
    filled = [index for index, count in enumerate(counts) if count]
    lines = []
    for index in range(filled[0], filled[-1] + 1) if filled else ():
        low, high = 100 * index // _BINS, 100 * (index + 1) // _BINS
        bar = "█" * max(counts[index] > 0, round(_BARS * counts[index] / max(counts)))
        lines.append(f"  {low:>2}–{high:>3} %  {bar}{' ' if bar else ''}{counts[index]}")
    return lines
