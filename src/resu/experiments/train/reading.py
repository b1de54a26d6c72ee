"""Configurations from YAML and JSON files and from ``key=value`` texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from resu.experiments.train.config import Config
from resu.experiments.train.typed import ConfigError, build

__all__ = ["apply_settings", "as_config", "load_config", "put", "read_mapping"]

_SECTIONS = ("data", "model", "method", "optimizer", "schedule")


def load_config(path: str | Path, settings: Iterable[str] = ()) -> Config:
    """A configuration from a ``.yaml``, ``.yml`` or ``.json`` file, with ``section.key=value`` texts over it.

    Raises:
        ConfigError: If the file is not readable as such, a key is unknown, or a value cannot be meant.
    """
    return as_config(apply_settings(read_mapping(path), settings))


def as_config(values: Mapping[str, Any]) -> Config:
    """A configuration from plain mappings.

    Raises:
        ConfigError: See :func:`load_config`.
    """
    return build(Config, values, "the configuration")


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file.

    Raises:
        ConfigError: If the file is neither, or holds something else.
        ImportError: If it is YAML and PyYAML is not installed.
    """
    path = Path(path)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ConfigError(f"{path} must end in .yaml, .yml or .json")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from None
    found = _json(text, path) if path.suffix == ".json" else _yaml(text, path)
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, got {type(found).__name__}")
    return found


def _json(text: str, path: Path) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise ConfigError(f"{path} has the key {twice!r} twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None


def _yaml(text: str, path: Path | str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            f'{path} is YAML, which needs PyYAML: pip install "resu-torch[train]" (or write it as JSON)', name="yaml"
        ) from error

    class Loader(yaml.SafeLoader):
        """Safe, and a key may stand only once: the second would silently win."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
            if twice is not None:
                raise ConfigError(f"{path} has the key {twice!r} twice (line {node.start_mark.line + 1} and after)")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


def apply_settings(values: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """``values`` with ``section.key=value`` texts over them.

    A value is read as JSON, and as a text where it is none: ``3``, ``1e-3``, ``true``, ``null``, ``[300, 100]``,
    ``rigl``.

    Raises:
        ConfigError: If a text has no ``=``, or a part of the key names no section.

    Example:
        >>> apply_settings({"method": "dense", "seed": 0}, ["method.name=rigl", "method.sparsity=0.9", "seed=3"])
        {'method': {'name': 'rigl', 'sparsity': 0.9}, 'seed': 3}
    """
    found = dict(values)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"a setting is written section.key=value, got {setting!r}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        found = put(found, key.strip(), value)
    return found


def put(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """``values`` with one dotted key set.

    Where the key is a whole section, a text changes its name and a mapping goes over what it says.

    Raises:
        ConfigError: If a part of the key names no section.

    Example:
        >>> put({"method": {"name": "set", "sparsity": 0.9}}, "method", "rigl")
        {'method': {'name': 'rigl', 'sparsity': 0.9}}
    """
    first, *rest = key.split(".")
    if first in _SECTIONS and not rest and isinstance(value, (str, Mapping)):
        return {**values, first: {**_section(values, first), **_named(value)}}
    if not rest:
        return {**values, first: value}
    return {**values, first: put(_section(values, first), ".".join(rest), value)}


def _section(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A section that there is, or an empty one."""
    section = _named(values.get(key, {}))
    if not isinstance(section, Mapping):
        raise ConfigError(f"{key!r} is no section with keys of its own, it is {section!r}")
    return section


def _named(value: Any) -> Any:
    """A name alone stands for a section."""
    return {"name": value} if isinstance(value, str) else value
