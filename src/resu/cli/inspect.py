"""``resu inspect``: what is in a checkpoint or mask file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from resu.cli._common import Json, format_bytes, format_count, print_json, stdout

EXAMPLE = "Example: resu inspect resu_quickstart/model.safetensors"


def command(
    file: Annotated[Path, typer.Argument(help="A checkpoint or mask file, or a folder of sharded safetensors.")],
    as_json: Json = False,
) -> None:
    """Show what a checkpoint or mask file holds: sparsity, kept weights and bytes of each tensor."""
    from resu.formats.inspect import describe
