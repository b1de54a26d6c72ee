"""Model folders: written whole or not at all, with everything beside the weights carried over."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from resu.core.io import naming

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = [
    "ADAPTER",
    "REPORTS",
    "RESULT_FILES",
    "WEIGHT_ENDINGS",
    "alone",
    "check_apart",
    "check_free",
    "copy_companions",
    "new_folder",
    "put_in_place",
]

# What pruning and fine-tuning write beside the model; a folder that holds a report is one of ours.
REPORTS = ("pruning.json", "run.json")
RESULT_FILES = ("masks.safetensors", *REPORTS, "log.csv")
# The folder of low-rank updates that fine-tuning keeps beside the model, and what tells it from any other.
ADAPTER = "adapter"
_ADAPTER_FILES = ("adapter.json", "adapter_config.json")
# Weights in any format: a copy would be the dense model again.
WEIGHT_ENDINGS = (
    *(".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"),
    *(".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ot", ".tflite", ".mlmodel", ".npz"),
)


@contextmanager
def new_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder to write to; it becomes ``path`` at the end, whole, or not at all.

    If the body raises (a full disk, an interrupt), the temporary folder is removed and ``path`` is as before.

    Args:
        path: Where the folder shall be; the one above it must exist. An empty folder there is no obstacle.
        overwrite: Whether an earlier result there, a folder with one of :data:`REPORTS`, may be replaced. Any other
            folder with content never is.

    Raises:
        FileExistsError: If something is there that may not be replaced.
        FileNotFoundError: If the folder above does not exist.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as above:
        ...     with new_folder(Path(above) / "model") as temporary:
        ...         _ = (temporary / "config.json").write_text("{}")
        ...     sorted(p.name for p in Path(above).rglob("*"))
        ['config.json', 'model']
    """
    target = Path(os.path.realpath(path))
    check_free(target, overwrite=overwrite)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    temporary.mkdir()
    try:
        with naming(path):
            yield temporary
        put_in_place(temporary, target, overwrite=overwrite)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(folder: Path, target: Path, *, overwrite: bool = False) -> None:
    """Give a folder that was written beside ``target`` its name, once it is on disk; an earlier result goes.

    Raises:
        FileExistsError: If something is there that may not be replaced.
    """
    _flush(folder)
    check_free(target, overwrite=overwrite)  # something may have come since
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    try:
        if target.exists():
            os.replace(target, old)
        os.replace(folder, target)
    finally:
        if old.exists() and not target.exists():
            os.replace(old, target)
        shutil.rmtree(old, ignore_errors=True)


def check_free(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """What :func:`new_folder` asks of a path, to ask it before long work and not after it.

    Raises:
        FileExistsError: If something is there that may not be replaced.
        FileNotFoundError: If the folder above does not exist.
        PermissionError: If the folder above cannot be written.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder {target.parent} does not exist; make it first")
    if not os.access(target.parent, os.W_OK):  # a mount that is read-only, for one
        raise PermissionError(f"the folder {target.parent} cannot be written; name another place")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file; name a folder")
    if not overwrite:
        raise FileExistsError(f"{target} is there already; pass overwrite=True to replace an earlier result")
    if not any((target / name).is_file() for name in REPORTS):
        raise FileExistsError(
            f"{target} holds no pruning.json or run.json, so it is no earlier result and is not replaced"
        )


@contextmanager
def alone(path: str | os.PathLike[str]) -> Iterator[None]:
    """No other run of this machine makes the same folder meanwhile: two would mix what they leave until the end.

    A hidden file beside the folder is locked, which the system undoes should the process die. Of several processes of
    one run (``torchrun``) the first one does it. Where there are no such locks this does nothing.

    Raises:
        FileExistsError: If another run is making it.
    """
    target = Path(os.path.realpath(path))
    lock = target.with_name(f".{target.name}.lock")
    if fcntl is None or os.environ.get("RANK", "0") != "0" or not os.access(target.parent, os.W_OK):
        yield
        return
    held = _locked(lock)
    if held is None:
        raise FileExistsError(f"another run is making {target}; wait for it, or name another place")
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(held)


def _locked(lock: Path) -> int | None:
    """A file that this process alone has locked; None where another one has."""
    while True:
        opened = os.open(lock, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(opened)
            return None
        except OSError:  # a file system without locks
            return opened
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(lock), os.fstat(opened)):
                return opened
        os.close(opened)  # the run before has just removed it


def check_apart(
    out: str | os.PathLike[str], source: str | os.PathLike[str], *others: str | os.PathLike[str] | None
) -> None:
    """What is read must outlive the result: replacing ``out`` would take everything in it along.

    Args:
        out: What will be written.
        source: The model that is read; a result inside a source folder is refused too.
        others: Other files and folders that are read (masks, texts, the dense model); None is skipped.

    Raises:
        ValueError: If ``out`` is the source or inside it or another folder that is read, or is or holds something that
            is read.

    Example:
        >>> check_apart("model/pruned", "elsewhere/model")
        >>> check_apart("results", "results/model")
        Traceback (most recent call last):
        ...
        ValueError: out must not be the source (results/model), inside or above it, got results; name another place
    """
    target, read = Path(os.path.realpath(out)), Path(os.path.realpath(source))
    if target == read or target in read.parents or (read.is_dir() and read in target.parents):
        raise ValueError(f"out must not be the source ({source}), inside or above it, got {out}; name another place")
    for other in others:
        place = None if other is None else Path(os.path.realpath(other))
        if place is not None and target in (place, *place.parents):
            raise ValueError(f"{other} is read and would be replaced by {out}; name another place to write to")
        if place is not None and place.is_dir() and place in target.parents:
            raise ValueError(f"{other} is read, and {out} lies in it; name another place to write to")


def _flush(folder: Path) -> None:
    """Have the system write all files of a folder to disk before it gets its name."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "r+b") as opened:
                os.fsync(opened.fileno())


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy what lies beside the weights: configuration, tokenizer, licence, subfolders such as ``1_Pooling``.

    Weight files of any format, results of pruning and fine-tuning (an adapter's folder among them) and hidden entries
    are not copied, nor is a file that ``target`` has already. Links are followed, as the download cache of Hugging Face
    consists of them.

    Returns:
        Weight files that were left out although they are not the safetensors of the model itself, such as
        ``onnx/model.onnx``: they hold the dense model. Relative to ``source``, sorted.
    """
    left_out: list[str] = []
    for folder, names, files in os.walk(source, followlinks=True):
        here = Path(folder)
        names[:] = sorted(name for name in names if not name.startswith(".") and not _same(here / name, target))
        if here == source and any((source / ADAPTER / file).is_file() for file in _ADAPTER_FILES):
            names.remove(ADAPTER)  # it belongs to the weights that it was trained beside
        for name in sorted(files):
            relative = (here / name).relative_to(source)
            if name.lower().endswith(WEIGHT_ENDINGS):
                own = here == source and ".safetensors" in name
                if not own:
                    left_out.append(str(relative))
            elif not name.startswith(".") and str(relative) not in RESULT_FILES:
                copy = target / relative
                if not copy.exists():
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(here / name, copy)
    return sorted(left_out)


def _same(a: Path, b: Path) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)
