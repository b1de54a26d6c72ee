"""Frozen dataclasses out of plain values (of YAML, JSON, the command line), strictly.

An unknown key is an error that names the known ones and the nearest; so is a value of another type.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

__all__ = ["ConfigError", "build", "check_options", "coerce", "hints_of", "plain", "unknown_key"]

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be meant; the text says where, what is allowed and what was given."""


def unknown_key(key: object, known: Iterable[str], where: str) -> ConfigError:
    """The error of a key that nothing reads.

    Example:
        >>> print(unknown_key("sparsty", ["name", "sparsity"], "method"))
        unknown key 'sparsty' in method (did you mean 'sparsity'?); known: name, sparsity
    """
    known = sorted(known)
    near = difflib.get_close_matches(str(key), known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return ConfigError(f"unknown key {key!r} in {where}{hint}; known: {', '.join(known) or 'none'}")


def hints_of(kind: Any) -> dict[str, Any]:
    """Types of what can be set in a dataclass, or by keyword alone in a function, by name."""
    hints = typing.get_type_hints(kind)
    if dataclasses.is_dataclass(kind):
        return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}
    return {name: hints[name] for name in kind.__kwdefaults__ or ()}


def build(kind: type[T], values: Any, where: str) -> T:
    """A dataclass from a mapping.

    A field ``options`` takes the keys that are no field's: those of the thing that the section names. Where the
    class has a field ``name``, a text alone stands for ``{name: text}``.

    Args:
        kind: The dataclass; its fields may be dataclasses.
        values: What was read.
        where: How errors name the place.

    Raises:
        ConfigError: If a key is unknown or missing, or a value is not of its field's type or range.
    """
    hints = hints_of(kind)
    if isinstance(values, str) and "name" in hints:
        values = {"name": values}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a mapping with the keys {', '.join(hints)}, got {values!r}")
    given: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for key, value in values.items():
        if key in hints and key != "options":
            given[key] = coerce(value, hints[key], key if where == "the configuration" else f"{where}.{key}")
        elif "options" in hints:
            options[str(key)] = value
        else:
            raise unknown_key(key, hints, where)
    if "options" in hints:
        given["options"] = options
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in given:
            raise ConfigError(f"{where} lacks the key {field.name!r}")
    return kind(**given)


def coerce(value: Any, hint: Any, where: str) -> Any:
    """``value`` as its type hint wants it: lists become tuples, whole numbers floats where floats are meant.

    Raises:
        ConfigError: If it is of another type.

    Example:
        >>> coerce([300, 100], tuple[int, ...], "model.hidden")
        (300, 100)
        >>> coerce("1e-3", float, "optimizer.lr")  # what YAML 1.1 makes of 1e-3
        0.001
    """
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, arguments, where)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool) != any(isinstance(a, bool) for a in arguments):
            raise ConfigError(f"{where} must be one of {', '.join(map(str, arguments))}, got {value!r}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        return tuple(coerce(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a mapping, got {value!r}")
        return {
            coerce(k, arguments[0], f"a key of {where}"): coerce(v, arguments[1], f"{where}.{k}")
            for k, v in value.items()
        }
    return _scalar(value, hint, where)


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}


def _scalar(value: Any, hint: Any, where: str) -> Any:
    if hint is float and not isinstance(value, bool) and isinstance(value, (int, float, str)):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    elif hint in _NAMES and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} must be {_NAMES.get(hint, hint)}, got {value!r}")


def _one_of(value: Any, hints: tuple[Any, ...], where: str) -> Any:
    if value is None and types.NoneType in hints:
        return None
    errors = []
    # Exact types first: "2:4" is a text where a text or a number may stand.
    for hint in sorted(hints, key=lambda h: h is not type(value)):
        if hint is types.NoneType:
            continue
        try:
            return coerce(value, hint, where)
        except ConfigError as error:
            errors.append(str(error))
    raise ConfigError(errors[0] if len(errors) == 1 else f"{where}: " + "; or ".join(errors))


def check_options(
    kind: Any, options: Mapping[str, Any], where: str, fields: Iterable[str] = (), without: Iterable[str] = ()
) -> dict[str, Any]:
    """Options of a function (by keyword alone) or a dataclass, coerced.

    Args:
        kind: The function or dataclass that will take them.
        options: What was given.
        where: How errors name the place.
        fields: Keys of the place that are no options, so that errors name them too.
        without: Names that are set elsewhere.

    Raises:
        ConfigError: If one is unknown or not of its type.
    """
    hints = {name: hint for name, hint in hints_of(kind).items() if name not in set(without)}
    for key in options:
        if key not in hints:
            raise unknown_key(key, {*hints, *fields}, where)
    return {key: coerce(value, hints[key], f"{where}.{key}") for key, value in options.items()}


def plain(value: Any) -> Any:
    """A dataclass as mappings and lists that JSON and YAML write; ``options`` lie among the other keys again."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "options"}
        return found | plain(getattr(value, "options", {}))
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
