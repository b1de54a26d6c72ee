"""Masks that a source brings of weights that are left as they are: they go along into the result."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from resu.core.mask import SparseMask
from resu.core.mask_files import each_mask, mask_header
from resu.formats.relayout import MASK_FILE

__all__ = ["KEPT", "brought_masks", "carried_masks", "sparser_before"]

#: What a report says of a weight that was pruned before, beside why it is not pruned now.
KEPT = "; pruned before, and its mask is kept"


def brought_masks(source: str | os.PathLike[str]) -> dict[str, Any]:
    """What the header of ``masks.safetensors`` beside a source says of each mask (shape, kept); empty without one.

    Raises:
        FileFormatError: If there is such a file and it is no mask file.
    """
    file = Path(source) / MASK_FILE
    return dict(mask_header(file)["masks"]) if file.is_file() else {}


def carried_masks(
    source: str | os.PathLike[str], shapes: Mapping[str, Sequence[int]], pruned: Collection[str], prefix: str = ""
) -> Iterator[tuple[str, SparseMask]]:
    """The masks of a source that hold on in a result whose other weights were pruned, one in memory at a time.

    Args:
        source: A folder, with or without ``masks.safetensors``.
        shapes: Of the weights of the result, by name.
        pruned: Names of the weights that have masks of their own there.
        prefix: That of a model's body, with or without which a name means the same weight.

    Yields:
        ``(name in the result, mask)``. A mask of a weight that the result does not have, or has in another shape, is
        left out.

    Raises:
        FileFormatError: If the mask file is damaged.
    """
    entries = brought_masks(source)
    places = {}
    for name, entry in entries.items():
        for here in (name, prefix + name, name.removeprefix(prefix)):
            if here in shapes and here not in pruned and list(shapes[here]) == list(entry["shape"]):
                places[name] = here
                break
    if places:
        for name, mask in each_mask(Path(source) / MASK_FILE, places):
            yield places[name], mask


def sparser_before(source: str | os.PathLike[str], kept: Mapping[str, int]) -> list[str]:
    """A warning where weights were pruned further in the source than they are now, else nothing.

    Args:
        source: A folder, with or without ``masks.safetensors``.
        kept: How many weights the result keeps, by name.
    """
    before = {name: int(entry["kept"]) for name, entry in brought_masks(source).items()}
    odd = [name for name in kept if name in before and before[name] < kept[name]]
    if not odd:
        return []
    first = odd[0]
    return [
        f"{len(odd)} of the weights had fewer active positions in the source than now ({first}: {before[first]}, now "
        f"{kept[first]}); the zeros among them count as kept and may train again"
    ]
