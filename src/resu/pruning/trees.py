"""Arguments and results of modules as trees: tuples, lists and mappings with leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

__all__ = ["Path", "leaves", "map_leaves"]

Path = tuple[Any, ...]


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """``(path, leaf)`` in order.

    Example:
        >>> list(leaves(({"a": 1}, [2])))
        [((0, 'a'), 1), ((1, 0), 2)]
    """
    if isinstance(tree, (tuple, list)):
        for i, value in enumerate(tree):
            yield from leaves(value, (*path, i))
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    else:
        yield path, tree


def map_leaves(change: Callable[[Path, Any], Any], tree: Any, path: Path = ()) -> Any:
    """The tree with ``change(path, leaf)`` in place of each leaf; mappings become dicts.

    Example:
        >>> map_leaves(lambda path, x: x + 1, {"a": (1, 2)})
        {'a': (2, 3)}
    """
    if isinstance(tree, (tuple, list)):
        values = [map_leaves(change, value, (*path, i)) for i, value in enumerate(tree)]
        if isinstance(tree, list):
            return values
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    if isinstance(tree, Mapping):
        return {key: map_leaves(change, value, (*path, key)) for key, value in tree.items()}
    return change(path, tree)
