"""Globs over names of weights: the one way in which weights are named by a user."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

__all__ = ["glob_list", "glob_matches", "listing"]


def glob_list(globs: str | Iterable[str] | None) -> list[str] | None:
    """One glob, several, or None, as a list or None.

    Example:
        >>> glob_list("fc*"), glob_list(("a", "b")), glob_list(None)
        (['fc*'], ['a', 'b'], None)
    """
    return [globs] if isinstance(globs, str) else None if globs is None else list(globs)


def glob_matches(glob: str, name: str) -> bool:
    """Whether a glob (``fnmatch``, case-sensitive) means a parameter: by its name, or by its module's.

    Example:
        >>> glob_matches("fc1", "fc1.weight"), glob_matches("*.weight", "fc1.weight"), glob_matches("fc", "fc1.weight")
        (True, True, False)
    """
    return fnmatchcase(name, glob) or fnmatchcase(name.rpartition(".")[0], glob)


def listing(names: Collection[str], limit: int = 20) -> str:
    """Names for an error message, the first ``limit`` of them.

    Example:
        >>> listing(["a", "b", "c"], limit=2)
        'a, b, … (3 in all)'
    """
    return ", ".join(list(names)[:limit]) + (f", … ({len(names)} in all)" if len(names) > limit else "")
