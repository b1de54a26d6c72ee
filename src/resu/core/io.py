"""Files that are either whole or not there: atomic writing, checked headers, one kind of error."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

__all__ = [
    "FileFormatError",
    "naming",
    "open_header",
    "replacing",
    "seal_header",
    "tensor_checksum",
    "user_metadata",
    "write_all",
]


# What the system says, without a file's name, where there is no more room to write.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FileFormatError(ValueError):
    """A file that is not what it should be: damaged, truncated, of another kind or a newer version."""


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Names what is being written in the system's errors that say there is no room for it, which come without a name.

    Raises:
        OSError: With ``filename``, also where the safetensors library has wrapped it.

    Example:
        >>> with naming("a.safetensors"):
        ...     raise OSError(errno.EFBIG, "File too large")
        Traceback (most recent call last):
        OSError: [Errno 27] File too large: 'a.safetensors'
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM and error.filename is None:
            error.filename = os.fspath(path)
        raise
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):
            number = int(found[1])
            raise OSError(number, os.strerror(number), os.fspath(path)) from error
        raise


@contextmanager
def replacing(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary path to write to; it becomes ``path`` at the end, whole and on disk, or not at all.

    If the body raises (a full disk, an interrupt), the temporary file is removed and ``path`` is as before.

    Args:
        path: Where the file shall be; its folder must exist. A symbolic link is followed.
        overwrite: Whether a file that is there may be replaced.

    Raises:
        FileExistsError: If there is one and ``overwrite`` is False.
        FileNotFoundError: If the folder does not exist.
        OSError: If there is no room for the file (disk, quota, largest file); ``filename`` is ``path``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder) / "a.txt") as temporary:
        ...         _ = temporary.write_text("whole")
        ...     sorted(p.name for p in Path(folder).iterdir())
        ['a.txt']
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already; pass overwrite=True to replace it")
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file in it")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder {target.parent} does not exist; make it first")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        # Opened first, so that the file gets the usual permissions and nobody else's file is written to.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = (target if target.exists() else temporary).stat().st_mode & 0o777
        with naming(path):
            yield temporary
            _sync(temporary)
        os.chmod(temporary, mode)  # some writers replace the file by one that only its owner may read
        os.replace(temporary, target)
        if os.name == "posix":
            _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_all(file: IO[bytes], data: bytes | memoryview) -> None:
    """Write bytes to a file that may take fewer at once than it is given, as unbuffered ones do when room runs out."""
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]


def tensor_checksum(tensor: Tensor) -> str:
    """SHA-256 (hex) of a tensor's dtype, shape and bytes.

    Example:
        >>> tensor_checksum(torch.zeros(2)) == tensor_checksum(torch.zeros(2, 1))
        False
    """
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype} {tuple(data.shape)}".encode())
    if data.numel():
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def user_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """The user's metadata as it comes back from JSON.

    Raises:
        TypeError: If it does not survive JSON unchanged.
    """
    given = dict(metadata or {})
    try:
        back: dict[str, Any] = json.loads(json.dumps(given, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must be plain JSON (text, numbers, lists, objects): {error}") from None
    return back


def seal_header(key: str, body: Mapping[str, Any]) -> dict[str, str]:
    """A header as text, with its checksum beside it: ``{key: json, key_sha256: hex}``."""
    text = json.dumps(body, sort_keys=True)
    return {key: text, f"{key}_sha256": hashlib.sha256(text.encode()).hexdigest()}


def open_header(key: str, given: Mapping[str, Any], version: int, where: object) -> dict[str, Any]:
    """Inverse of :func:`seal_header`, checked.

    Raises:
        FileFormatError: If the header is absent, damaged or of a newer version.
    """
    text, seal = given.get(key), given.get(f"{key}_sha256")
    if not isinstance(text, str) or not isinstance(seal, str):
        raise FileFormatError(f"{where} has no {key} header; it was not written by resu, or is damaged")
    if hashlib.sha256(text.encode(errors="replace")).hexdigest() != seal:
        raise FileFormatError(f"the header of {where} does not match its checksum: the file is damaged")
    body: dict[str, Any] = json.loads(text)
    if not isinstance(body.get("version"), int) or body["version"] > version:
        raise FileFormatError(
            f"{where} has format version {body.get('version')!r}, this version of resu reads up to {version}; "
            "install a newer resu"
        )
    return body
