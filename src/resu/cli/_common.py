"""What all subcommands share: errors in one line, output folders, options, tables and progress."""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = [
    "CALIBRATION_TEXT",
    "CliError",
    "Device",
    "Force",
    "Json",
    "Length",
    "OneLineErrors",
    "Samples",
    "format_bytes",
    "format_count",
    "output_folder",
    "parse_bytes",
    "parse_sparsity",
    "print_json",
    "progress",
    "refuse_taken",
    "require",
    "shown_progress",
    "stdout",
    "write_whole",
]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files of an earlier run.")]
Device = Annotated[str | None, typer.Option(help="Where to compute, such as cuda.")]
CALIBRATION_TEXT: Any = typer.Option(help='Text to calibrate on: .txt, or .jsonl with one {"text": …} per line.')
Samples = Annotated[int, typer.Option(min=1, help="Calibration samples.")]
Length = Annotated[
    int | None, typer.Option(min=2, help="Tokens per sample; left out: the model's context, at most 2048.")
]


class CliError(Exception):
    """A user's mistake, said in one line; ends the command with exit code 2."""


class OneLineErrors(TyperGroup):
    """A command group that answers bad input with one line on stderr and exit code 2.

    The environment variable ``RESU_TRACEBACK=1`` shows where an error came from instead.
    """

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        def run() -> Any:
            return super(OneLineErrors, self).main(args, prog_name, complete_var, False, windows_expand_args, **extra)

        if not standalone_mode:
            return run()
        try:
            code = run()
            if code == 130:  # the parser has caught the interrupt
                fail("interrupted", code)
            sys.stdout.flush()
        except BrokenPipeError:  # `resu inspect … | head`: nobody listens any more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except (typer.Abort, KeyboardInterrupt):
            fail("interrupted", 130)
        except (CliError, ValueError, OSError, ImportError) as error:
            own = isinstance(error, ImportError) and (error.name or "").startswith("resu")
            if own or os.environ.get("RESU_TRACEBACK"):
                raise
            fail(describe_error(error))
        except Exception as error:
            # A usage error of the parser; which package defines its class depends on typer's version.
            if not hasattr(error, "format_message"):
                raise
            fail(f"{error.format_message()} (see {_command_path(error)} --help)")
        sys.exit(code if isinstance(code, int) else 0)


def _command_path(error: Any) -> str:
    context = getattr(error, "ctx", None)
    return str(context.command_path) if context is not None else "resu"


def fail(message: str, code: int = 2) -> None:
    """Print one line on stderr and leave."""
    print(f"resu: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def describe_error(error: BaseException) -> str:
    """An exception in words a user can act on."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def require(module: str, extra: str) -> Any:
    """Import an optional package, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if (error.name or "").partition(".")[0] != module.partition(".")[0]:
            raise
        name = {"sklearn": "scikit-learn"}.get(module.partition(".")[0], module.partition(".")[0])
        raise CliError(f'this needs {name}: pip install "resu-torch[{extra}]"') from None


# -- values --------------------------------------------------------------------------------------------


def parse_sparsity(text: str, option: str = "--sparsity") -> float:
    """A sparsity in [0, 1) from the command line.

    Raises:
        CliError: If it is no number or outside [0, 1).
    """
    from resu.core.counting import check_sparsity

    try:
        value = float(text)
    except ValueError:
        raise CliError(f"{option} must be a number in [0, 1), got {text!r}") from None
    try:
        return check_sparsity(value, option)
    except ValueError as error:
        raise CliError(str(error)) from None


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}I": 1024**power for power, unit in enumerate("KMGT", start=1)}


def parse_bytes(text: str, option: str = "--memory") -> int:
    """Bytes from ``"16GB"``, ``"16GiB"`` or ``"16000000000"``.

    Example:
        >>> parse_bytes("16GB"), parse_bytes("1.5 KiB")
        (16000000000, 1536)
    """
    cleaned = text.strip().upper().removesuffix("B").strip()
    number = cleaned.rstrip("KMGTI")
    unit = cleaned[len(number) :]
    try:
        value = float(number) * _UNITS[unit]
        if not 0 < value < float("inf"):
            raise ValueError
    except (ValueError, KeyError):
        raise CliError(f"{option} must be a positive size such as 16GB or 512MiB, got {text!r}") from None
    return int(value)


def format_bytes(n: float) -> str:
    """Bytes with a decimal unit.

    Example:
        >>> format_bytes(999), format_bytes(68_096), format_bytes(7.25e9)
        ('999 B', '68.1 kB', '7.25 GB')
    """
    if n < 1000:
        return f"{n:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        n /= 1000
        if n < 999.5 or unit == "TB":
            break
    return f"{n:.3g} {unit}" if n < 999.5 else f"{n:,.0f} {unit}"


def format_count(n: int) -> str:
    """An integer with thin separators.

    Example:
        >>> format_count(1234567)
        '1,234,567'
    """
    return f"{n:,}"


# -- files ---------------------------------------------------------------------------------------------


def refuse_taken(path: Path, force: bool, hint: str = "") -> None:
    """Stop if a folder for results holds files already, unless ``force``.

    Raises:
        CliError: If it does, or if it is a file.
    """
    if path.exists() and not path.is_dir():
        raise CliError(f"--out {path} is a file; name a folder")
    if path.is_dir() and not force and any(path.iterdir()):
        raise CliError(f"{path} holds results already{hint}; pass --force to replace them, or --out for another folder")


def output_folder(path: Path, force: bool, hint: str = "") -> Path:
    """Make sure that results can be written into a folder, before the work and not after it.

    Raises:
        CliError: If it is taken (:func:`refuse_taken`) or cannot be written.
    """
    refuse_taken(path, force, hint)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise CliError(f"--out {path} cannot be written: {error.strerror or error}") from None
    return path


def write_whole(path: Path, data: bytes) -> Path:
    """Write a file so that a failure leaves the old one whole; returns the path."""
    from resu.core.io import replacing

    with replacing(path, overwrite=True) as temporary:
        temporary.write_bytes(data)
    return path


# -- output --------------------------------------------------------------------------------------------


def stdout(width: int = 120) -> Console:
    """The console for results; wide enough for tables where the output is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=width)


def print_json(document: Any) -> None:
    """One JSON document on stdout; NaN and infinities become null, so that any parser reads it."""
    print(json.dumps(_plain(document), indent=2, ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if value is None or isinstance(value, (str, int)):
        return value
    return str(value)


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress display on stderr; silent where stderr is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns: Sequence[Any] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar


@contextmanager
def shown_progress(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """A callable ``(done, total, name)`` that shows how far one kind of work is."""
    with progress() as bar:
        task = bar.add_task(what, total=None)

        def tick(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{what} {name}".rstrip())

        yield tick
