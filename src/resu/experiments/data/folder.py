"""Where data lies, and the one error that says what was looked for and where."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["DataError", "find_file", "find_folder", "read_bytes"]

DEFAULT = Path("../shared/data")


class DataError(ValueError):
    """A data file is missing, cut short, or not what its name promises."""


def find_folder(name: str, directory: str | Path | None = None) -> Path:
    """The folder of one data set.

    Args:
        name: Name of the data set's folder, e.g. ``"fashion_mnist"``.
        directory: That folder itself or the one that holds it. Without it: ``RESU_DATA``, else
            ``../shared/data``, each holding the folder.

    Raises:
        DataError: If there is no such folder.
    """
    if directory is not None:
        given = Path(directory)
        if not given.is_dir():
            raise DataError(f"no data for {name!r}: {given} is not a folder")
        return given / name if (given / name).is_dir() else given
    root = Path(os.environ.get("RESU_DATA") or DEFAULT)
    if not (root / name).is_dir():
        source = "from RESU_DATA" if os.environ.get("RESU_DATA") else "the default; set RESU_DATA"
        raise DataError(f"no data for {name!r}: {root / name} is not a folder ({source}, or give a directory)")
    return root / name


def find_file(folder: Path, names: Sequence[str]) -> Path:
    """The first of ``names`` that exists in ``folder``.

    Raises:
        DataError: If none does.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"none of {', '.join(names)} is in {folder}")


def read_bytes(path: Path) -> bytes:
    """A whole file, decompressed by its suffix (``.gz``, ``.xz``).

    Raises:
        DataError: If it cannot be read or its compression is broken.
    """
    import gzip
    import lzma
    import zlib

    unpack = {".gz": gzip.decompress, ".xz": lzma.decompress}.get(path.suffix, bytes)
    try:
        return unpack(path.read_bytes())
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is cut short or not a {path.suffix[1:]} file: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error
