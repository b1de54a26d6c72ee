"""Nested states (of optimizers, drivers, trainers) as JSON and a flat dictionary of tensors: no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from resu.core.io import FileFormatError

__all__ = ["flatten", "unflatten"]


def flatten(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """``value`` as plain JSON; its tensors go to ``tensors`` under names that begin with ``path``.

    Raises:
        TypeError: On anything but numbers, text, None, tensors, lists, tuples and dictionaries with text or integer
            keys; it names the place.

    Example:
        >>> found = {}
        >>> flatten({"betas": (0.9, 0.99), 0: None}, found, "optimizer")
        {'dict': [['betas', {'tuple': [0.9, 0.99]}], [0, None]]}
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, list):
        return [flatten(item, tensors, f"{path}.{i}") for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": [flatten(item, tensors, f"{path}.{i}") for i, item in enumerate(value)]}
    if isinstance(value, Mapping) and all(type(key) in (str, int) for key in value):
        return {"dict": [[key, flatten(item, tensors, f"{path}.{key}")] for key, item in value.items()]}
    raise TypeError(
        f"cannot store {path} of type {type(value).__name__}: states hold numbers, text, None, tensors, lists, tuples "
        "and dictionaries with text or integer keys"
    )


def unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of :func:`flatten`.

    Raises:
        FileFormatError: If a tensor is missing or the structure is not one that :func:`flatten` makes.
    """
    if isinstance(value, list):
        return [unflatten(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()), ("", None))
    if kind == "tensor" and isinstance(content, str) and content in tensors:
        return tensors[content]
    if kind == "tuple" and isinstance(content, list):
        return tuple(unflatten(item, tensors) for item in content)
    if kind == "dict" and isinstance(content, list):
        return {key: unflatten(item, tensors) for key, item in content}
    raise FileFormatError(f"the stored state is damaged at {str(value)[:80]}")
