"""One registry class for everything that is chosen by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

__all__ = ["Registry"]


class Registry(Generic[T]):
    """Names to objects; an unknown name is an error that lists the known ones.

    Args:
        kind: What the names stand for, used in errors ("importance").

    Example:
        >>> scores = Registry("score")
        >>> @scores.register("half")
        ... def half(x):
        ...     return x / 2
        >>> scores["half"](4)
        2.0
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str, *, replace: bool = False) -> Callable[[T], T]:
        """Decorator that stores an object under ``name``.

        Raises:
            ValueError: If the name is taken and ``replace`` is False.
        """

        def add(item: T) -> T:
            if name in self._items and not replace:
                raise ValueError(f"{self.kind} {name!r} is registered already; pass replace=True to replace it")
            self._items[name] = item
            return item

        return add

    def __getitem__(self, name: str) -> T:
        try:
            return self._items[name]
        except (KeyError, TypeError):
            raise ValueError(f"unknown {self.kind} {name!r}; known: {', '.join(sorted(self._items))}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))

    def __len__(self) -> int:
        return len(self._items)
